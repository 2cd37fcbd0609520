// Makes a small stack, trains it for a few steps and prints one loss a step: the mean of y squared.
//
// The programs of the other languages do the same sums in the same order and print the same losses
// to the last bit.
#include <lamina/client.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <string>

#include <CLI/CLI.hpp>

using namespace lamina::client;

namespace {

constexpr int kBatch = 4, kSequence = 16, kHidden = 32;

absl::Status RunSteps(const Session& session, const Stack& stack, int steps) {
  Tensor tensors[3];
  for (Tensor& tensor : tensors) {
    absl::StatusOr<Tensor> made = session.NewTensor(DType::kFloat32, {kBatch, kSequence, kHidden});
    if (!made.ok()) return made.status();
    tensor = *made;
  }
  const auto& [x, y, dy] = tensors;
  const float count = static_cast<float>(x.size());
  for (int i = 0; i < kBatch * kSequence * kHidden; ++i) {
    x.floats()[i] = static_cast<float>(i * 37 % 101 - 50) / 64;  // exact in fp32
  }
  // Which transport it is shows with the first tensor.
  std::printf("transport: %s%s%s%s\n", Name(session.transport()),
              session.transport_reason().empty() ? "" : " (", session.transport_reason().c_str(),
              session.transport_reason().empty() ? "" : ")");
  for (int step = 0; step < steps; ++step) {
    absl::StatusOr<ForwardResult> forward = stack.Forward(x, {.output = y});
    if (!forward.ok()) return forward.status();
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      const double v = y.floats()[i];
      sum += v * v;
      dy.floats()[i] = 2 * y.floats()[i] / count;
    }
    std::printf("step %d  loss %.17g\n", step, sum / count);
    std::fflush(stdout);
    absl::StatusOr<BackwardResult> backward = stack.Backward(forward->context, dy);
    if (!backward.ok()) return backward.status();
    absl::StatusOr<ApplyResult> applied =
        stack.ApplyGradients({.learning_rate = 1e-2, .zero_gradients = true});
    if (!applied.ok()) return applied.status();
  }
  return absl::OkStatus();
}

absl::Status Train(const std::string& target, TransportPolicy transport, int steps) {
  absl::StatusOr<Client> client = Client::Connect(target);
  if (!client.ok()) return client.status();
  absl::StatusOr<Session> session =
      client->OpenSession({.client_name = "train-cpp", .transport = transport});
  if (!session.ok()) return session.status();
  StackConfig config{
      .batch_size = kBatch, .max_seq_length = kSequence, .hidden_size = kHidden, .heads = 4};
  config.num_hidden_layers = 2;
  config.attn_dropout_ratio = config.hidden_dropout_ratio = 0.1;
  config.seed = 1;
  const std::string name = "train-cpp-" + std::to_string(getpid());
  absl::StatusOr<Stack> stack = session->CreateStack(name, config);
  if (!stack.ok()) return stack.status();
  absl::Status result = RunSteps(*session, *stack, steps);
  // It would outlive this program.
  result.Update(client->DeleteStack(name));
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, TransportPolicy> transports = {{"auto", TransportPolicy::kAuto},
                                                             {"memfd", TransportPolicy::kRegions},
                                                             {"inline", TransportPolicy::kInline}};
  std::string target = DefaultTarget();
  std::string transport = "auto";
  int steps = 10;
  CLI::App app("Trains a small stack and prints one loss a step");
  app.add_option("--target", target, "The daemon: unix:PATH or HOST:PORT")->capture_default_str();
  app.add_option("--transport", transport, "auto, memfd or inline")
      ->check(CLI::IsMember(transports));
  app.add_option("--steps", steps, "Steps to train")->check(CLI::PositiveNumber);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  const absl::Status status = Train(target, transports.at(transport), steps);
  if (status.ok()) return 0;
  const std::string id = RequestIdOf(status);
  const std::string request = id.empty() ? "" : " (request " + id + ")";
  std::fprintf(stderr, "losses: %s: %s: %s%s\n", target.c_str(),
               absl::StatusCodeToString(status.code()).c_str(),
               std::string(status.message()).c_str(), request.c_str());
  return 1;
}
