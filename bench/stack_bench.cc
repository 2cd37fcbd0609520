// Our side of bench/stack: a Stack in this process, without a daemon, that obeys commands, so that
// the script can let it and a peer take turns on one device. Nothing runs on the device between a
// reply and the next command.
//
// A command a line on stdin, an answer of one JSON object a line on stdout; {"error": ...} says
// what went wrong and changes nothing else. It ends with its input.
//   create CONFIG     a stack of this config (JSON, StackConfig's names) instead of the one before
//   run N             N times Forward and Backward at batch_size x max_seq_length; milliseconds on
//                     the device: {"forward": [...], "backward": [...], "forward_backward": [...]}
//   run N padded LOW HIGH SEED   the same with batch_size sequences of lengths that are drawn
//   run N packed LOW HIGH SEED   uniformly from LOW..HIGH, others in each step, of which the seed
//                     tells: padded to max_seq_length, or packed. "tokens": theirs, a step each
//   run N filled LOW HIGH SEED   packed too, as many of them as batch_size x max_seq_length tokens
//                     hold, of the same lengths first: when one does not fit, the next 32 are
//                     looked at too
//   plan              {"bytes": total, "weights": ..., ...}
//   delete            frees the stack
//   ceilings DTYPE    {"product_tflops": ..., "copy_tbs": ...}
// The first line of the output names the device, before any command.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "device.h"
#include "lamina/transformer/config.h"
#include "lamina/transformer/stack.h"
#include "nlohmann/json.hpp"
#include "op_timer.h"

namespace lamina::bench {
namespace {

using Json = nlohmann::ordered_json;

class StackUnderTest {
 public:
  StackUnderTest(Device& device, const StackConfig& config)
      : device_(device), stack_(Value(Stack::Create(device.backend(), config))), tensors_(device) {
    const Shape shape{config.batch_size, config.max_seq_length, config.hidden_size};
    for (TensorView* view : {&input_, &output_, &output_grad_, &input_grad_})
      *view = tensors_.Noise(config.dtype, shape);
    Check(device.backend().Synchronize());
  }

  // How long sequences are: all max_seq_length, or drawn.
  struct Lengths {
    bool drawn = false, packed = false, filled = false;
    int64_t low = 0, high = 0;
    uint32_t seed = 0;

    std::vector<int32_t> Draw(std::mt19937& random, int64_t batch, int64_t seq) const {
      std::vector<int32_t> each;
      // As a loader does that looks ahead: what does not fit is for the next batch, and some of
      // what comes after it may fit.
      constexpr int kLookAhead = 32;
      int misses = 0;
      int64_t room = batch * seq;
      while (filled ? misses <= kLookAhead : std::ssize(each) < batch) {
        const auto length = static_cast<int32_t>(low + random() % (high - low + 1));
        if (filled && length > room) {
          ++misses;
          continue;
        }
        room -= length;
        each.push_back(length);
        if (misses > 0) ++misses;
      }
      return each;
    }
  };

  Json Run(int64_t steps, const Lengths& lengths) {
    Backend& backend = device_.backend();
    Json forward = Json::array(), backward = Json::array(), both = Json::array();
    Json tokens = Json::array();
    const int64_t batch = stack_->config().batch_size, seq = stack_->config().max_seq_length;
    if (lengths.drawn && (lengths.low < 1 || lengths.low > lengths.high || lengths.high > seq))
      throw std::runtime_error("lengths must be in 1.." + std::to_string(seq) +
                               ", the lower first");
    for (int64_t i = 0; i < steps; ++i) {
      ForwardArgs args{.layers = {0, stack_->config().num_hidden_layers}};
      args.input = input_;
      args.output = output_;
      TensorView output_grad = output_grad_, input_grad = input_grad_;
      std::optional<Tensors> numbers;
      int64_t total = batch * seq;
      if (lengths.drawn) {
        // A step's lengths don't depend on how many were drawn for the one before.
        std::mt19937 random(lengths.seed + static_cast<uint32_t>(i));
        const std::vector<int32_t> drawn = lengths.Draw(random, batch, seq);
        std::vector<int32_t> ends{0};
        for (const int32_t length : drawn) ends.push_back(ends.back() + length);
        total = ends.back();
        numbers.emplace(device_);
        if (lengths.packed) {
          args.longest = *std::max_element(drawn.begin(), drawn.end());
          args.cu_seqlens = {numbers->Copy(ends), DType::kI32, {std::ssize(ends)}};
          const Shape shape{total, stack_->config().hidden_size};
          for (TensorView* view : {&args.input, &args.output, &output_grad, &input_grad})
            *view = TensorView{view->data, view->dtype, shape};
        } else {
          args.lengths = {numbers->Copy(drawn), DType::kI32, {batch}};
        }
      }
      tokens.push_back(total);
      Check(backend.RecordMark(0));
      const std::unique_ptr<Context> context = Value(stack_->ForwardTraining(args));
      Check(backend.RecordMark(1));
      Check(stack_->Backward(*context, output_grad, input_grad));
      Check(backend.RecordMark(2));
      Check(backend.Synchronize());
      forward.push_back(Value(backend.SecondsBetween(0, 1)) * 1e3);
      backward.push_back(Value(backend.SecondsBetween(1, 2)) * 1e3);
      both.push_back(Value(backend.SecondsBetween(0, 2)) * 1e3);
    }
    return {{"forward", forward},
            {"backward", backward},
            {"forward_backward", both},
            {"tokens", tokens}};
  }

  Json Plan() const {
    const MemoryPlan& plan = stack_->plan();
    Json answer{{"bytes", plan.Total()}};
    for (int kind = 0; kind < kMemoryKinds; ++kind)
      answer[Name(static_cast<MemoryKind>(kind))] = plan.Bytes(static_cast<MemoryKind>(kind));
    return answer;
  }

 private:
  Device& device_;
  std::unique_ptr<Stack> stack_;
  Tensors tensors_;
  TensorView input_, output_, output_grad_, input_grad_;
};

class Commands {
 public:
  explicit Commands(Device& device) : device_(device) {}

  Json Obey(const std::string& line) {
    const size_t space = line.find(' ');
    const std::string command = line.substr(0, space);
    const std::string argument = space == std::string::npos ? "" : line.substr(space + 1);
    if (command == "create") {
      stack_.reset();
      const StackConfig config = Value(StackConfigFromJson(argument));
      stack_.emplace(device_, Value(Resolve(config, device_.backend().info().ordinal)));
      return Json::object();
    }
    if (command == "run") {
      std::istringstream words(argument);
      int64_t steps = 0;
      std::string how;
      StackUnderTest::Lengths lengths;
      if (!(words >> steps)) throw std::runtime_error("run: how many steps?");
      if (words >> how) {
        lengths.drawn = true;
        lengths.filled = how == "filled";
        lengths.packed = how == "packed" || lengths.filled;
        if ((!lengths.packed && how != "padded") ||
            !(words >> lengths.low >> lengths.high >> lengths.seed))
          throw std::runtime_error("run: N, or N padded|packed|filled LOW HIGH SEED");
      }
      return TheStack().Run(steps, lengths);
    }
    if (command == "plan") return TheStack().Plan();
    if (command == "delete") {
      stack_.reset();
      return Json::object();
    }
    if (command == "ceilings") {
      OpTimer timer(device_, 20);
      const Ceilings c = MeasureCeilings(device_, timer, ParseDType(argument));
      return {{"product_tflops", c.flops / 1e12}, {"copy_tbs", c.bytes / 1e12}};
    }
    throw std::runtime_error("no such command: " + command);
  }

 private:
  StackUnderTest& TheStack() {
    if (!stack_) throw std::runtime_error("create a stack first");
    return *stack_;
  }

  Device& device_;
  std::optional<StackUnderTest> stack_;
};

int Main(int argc, char** argv) {
  std::string name = "cpu";
  CLI::App app{"Times a stack's Forward and Backward, as commands on stdin say; see bench/stack."};
  app.add_option("--device", name, "cpu or cuda:N");
  CLI11_PARSE(app, argc, argv);
  try {
    Device device(name);
    const DeviceInfo& info = device.backend().info();
    std::cout << Json{{"device", info.name}, {"kind", info.kind}, {"uuid", info.uuid}}.dump()
              << std::endl;
    Commands commands(device);
    for (std::string line; std::getline(std::cin, line);) {
      Json answer;
      try {
        answer = commands.Obey(line);
      } catch (const std::exception& error) {
        answer = {{"error", error.what()}};
      }
      std::cout << answer.dump() << std::endl;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "stack_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace lamina::bench

int main(int argc, char** argv) { return lamina::bench::Main(argc, argv); }
