# The tests need a daemon, LAMINA_TARGET's: ruby client/ruby/test/lamina_test.rb. tests/clients runs them.

$LOAD_PATH.unshift File.expand_path("../lib", __dir__)
require "minitest/autorun"
require "lamina"

class LaminaTest < Minitest::Test
  CONFIG = { batch_size: 2, max_seq_length: 8, hidden_size: 16, heads: 2, num_hidden_layers: 2,
             hidden_dropout_ratio: 0.1, seed: 3 }.freeze

  # Runs every call, but the caller gets an error instead of those answers that it is to lose.
  class Losing
    attr_reader :calls

    # loses: given a call's number, from 1.
    def initialize(stub, error, &loses)
      @stub, @error, @loses, @calls = stub, error, loses, 0
    end

    %i[forward backward apply_gradients].each do |name|
      define_method(name) do |request, deadline:|
        answer = @stub.public_send(name, request, deadline: deadline)
        @calls += 1
        raise @error, "the answer was lost" if @loses.call(@calls)
        answer
      end
    end
  end

  def setup
    skip "LAMINA_TARGET names no daemon" if ENV["LAMINA_TARGET"].to_s.empty?
    @client = Lamina::Client.new
    @stacks = []
    @sessions = []
  end

  def teardown
    return if @client.nil?
    @stacks.each { |name| @client.delete_stack(name) }
    @sessions.each(&:close)
    @client.close
  end

  def open_session(transport = "auto")
    Lamina::Session.new(@client, name: "ruby test", transport: transport).tap { |session| @sessions << session }
  end

  def new_stack(session)
    @stacks << "ruby-test-#{Process.pid}-#{Process.clock_gettime(Process::CLOCK_MONOTONIC, :nanosecond)}"
    session.create_stack(@stacks.last, **CONFIG)
  end

  def new_tensor(session)
    session.tensor(2, 8, 16).tap { |tensor| tensor.values = Array.new(256) { |i| i % 7 - 3 } }
  end

  # Trains one step, with y as its own gradient; returns the gradients' norm and the gradient by x.
  def step(session, stack)
    x, y, dx = Array.new(3) { new_tensor(session) }
    stack.backward(stack.forward(x, y), y, dx)
    applied = stack.apply_gradients(learning_rate: 1e-2, zero_gradients: true)
    assert applied.applied
    assert_equal 1, applied.step
    [applied.grad_norm, dx.values]
  end

  def refused(error, words)
    raised = assert_raises(error) { yield }
    assert_includes raised.details, words
  end

  # The session's calls of layers go through a Losing from here on.
  def lose(stack, error, &loses)
    losing = Losing.new(@client.layers, error, &loses)
    stack.instance_variable_set(:@layers, losing)
    losing
  end

  def test_both_transports_give_the_same
    regions, inline = open_session("memfd"), open_session("inline")
    norm, dx = step(regions, new_stack(regions))
    refute_equal 0, norm
    assert_equal [norm, dx], step(inline, new_stack(inline))
  end

  def test_a_repeated_call_runs_once
    session = open_session
    once = step(session, new_stack(session))
    [GRPC::Unavailable, GRPC::DeadlineExceeded].each do |error|
      stack = new_stack(session)
      losing = lose(stack, error, &:odd?)
      assert_equal once, step(session, stack)
      assert_equal 6, losing.calls
    end
  end

  def test_an_answer_that_stays_lost_ends_mutations
    session = open_session
    stack = new_stack(session)
    losing = lose(stack, GRPC::Unavailable) { true }
    x, y = new_tensor(session), new_tensor(session)
    refused(GRPC::Unavailable, "the answer was lost") { stack.forward(x, y) }
    refused(GRPC::FailedPrecondition, "open a new session") { stack.apply_gradients(learning_rate: 1) }
    assert_equal Lamina::Session::ATTEMPTS, losing.calls
  end

  def test_a_refused_call_uses_no_sequence
    session = open_session
    stack = new_stack(session)
    refused(GRPC::FailedPrecondition, "context_id") { stack.backward("none", new_tensor(session)) }
    step(session, stack)
  end

  def test_tensors
    session = open_session("memfd")
    [[0], [2, -1], [1.5]].each { |shape| assert_raises(ArgumentError) { session.tensor(*shape) } }
    tensor = new_tensor(session)
    assert_raises(ArgumentError) { tensor.values = [1] }
    tensor.buffer.set_value(:f32, 4, 0.5)
    assert_equal [-3, 0.5, -1], tensor.values.first(3)
    assert_equal 1, regions(session)
    2.times { tensor.free }
    assert_equal 0, regions(session)
  end

  def regions(session)
    @client.sessions.list_regions(Lamina::V1::ListRegionsRequest.new(session_id: session.id)).regions.size
  end

  def test_stacks_by_name
    session = open_session
    step(session, session.stack(new_stack(session).name))
    refused(GRPC::NotFound, "none") { session.stack("none") }
    refused(GRPC::InvalidArgument, "name") { session.create_stack("a b") }
    refused(GRPC::NotFound, "none") { @client.delete_stack("none") }
  end

  def test_the_end_of_a_session_shows
    session = open_session
    stack = new_stack(session)
    x, y = new_tensor(session), new_tensor(session)
    @client.sessions.delete_session(Lamina::V1::DeleteSessionRequest.new(session_id: session.id))
    refused(GRPC::Unavailable, "this session has ended") do
      sleep 0.01 until session.over
      stack.forward(x, y)
    end
    refused(GRPC::Unavailable, "this session has ended") { session.tensor(1) }
  end

  def test_an_unknown_transport
    assert_raises(ArgumentError) { open_session("posix") }
  end
end
