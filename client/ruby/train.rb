#!/usr/bin/env ruby
# Makes a small stack, trains it for a few steps and prints one loss a step: the mean of y squared.
#
# The programs of the other languages do the same sums in the same order and print the same losses to the last bit.

$LOAD_PATH.unshift File.expand_path("lib", __dir__)
require "optparse"
require "lamina"

SHAPE = [4, 16, 32].freeze # batch, sequence, hidden
COUNT = SHAPE.inject(:*)

def train(target, transport, steps)
  Lamina::Client.open(target) do |client|
    name = "train-ruby-#{Process.pid}"
    client.session(name: "train-ruby", transport: transport) do |session|
      reason = session.transport_reason
      puts "transport: #{session.transport}#{" (#{reason})" if reason}"
      stack = session.create_stack(
        name, batch_size: SHAPE[0], max_seq_length: SHAPE[1], hidden_size: SHAPE[2], heads: 4, num_hidden_layers: 2,
        attn_dropout_ratio: 0.1, hidden_dropout_ratio: 0.1, seed: 1
      )
      run_steps(session, stack, steps)
    ensure
      delete(client, name) if stack # it would outlive this program
    end
  end
end

# Says nothing where it can't: an error that brought us here says more.
def delete(client, name)
  client.delete_stack(name)
rescue GRPC::BadStatus
  nil
end

def run_steps(session, stack, steps)
  x, y, dy = Array.new(3) { session.tensor(*SHAPE) }
  x.values = Array.new(COUNT) { |i| (i * 37 % 101 - 50) / 64.0 } # exact in fp32
  steps.times do |step|
    context = stack.forward(x, y)
    out = y.values
    # Not Array#sum, which compensates for rounding: the others add one by one.
    sum = out.inject(0.0) { |total, v| total + v * v }
    puts format("step %d  loss %.17g", step, sum / COUNT)
    dy.values = out.map { |v| 2 * v / COUNT }
    stack.backward(context, dy)
    stack.apply_gradients(learning_rate: 1e-2, zero_gradients: true)
  end
end

options = { target: Lamina.default_target, transport: "auto", steps: 10 }
parser = OptionParser.new do |p|
  p.on("--target TARGET", "the daemon: unix:PATH or HOST:PORT (default #{options[:target]})")
  p.on("--transport NAME", %w[auto memfd inline], "auto, memfd or inline")
  p.on("--steps N", /\A[1-9]\d*\z/, "steps to train, 1 or more (default 10)")
end
begin
  parser.parse!(into: options)
  raise OptionParser::NeedlessArgument, ARGV.first unless ARGV.empty?
rescue OptionParser::ParseError => e
  warn "train.rb: #{e.message}: see --help"
  exit 2
end

$stdout.sync = true
begin
  train(options[:target], options[:transport], Integer(options[:steps]))
rescue GRPC::BadStatus => e
  request = Lamina.request_id(e)
  warn "train.rb: #{options[:target]}: #{e.class.name.split("::").last}: #{e.details}#{" (request #{request})" if request}"
  exit 1
end
