// Drives a running laminad through the installed library and checks what comes back. One check a
// run: consumer TARGET CHECK; prints what went wrong and exits 1, or exits 0. Some checks need a
// second target, of the same daemon, and some their driver's help: see tests/cpp_consumer/run.
#include <lamina/client.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace lamina::client;  // the whole program is about it

constexpr int kSteps = 12;
const Shape kShape = {3, 17, 32};

[[noreturn]] void Fail(int line, const std::string& what) {
  std::fprintf(stderr, "consumer.cc:%d: %s\n", line, what.c_str());
  std::exit(1);
}

void Require(bool holds, const char* what, int line) {
  if (!holds) Fail(line, what);
}
#define REQUIRE(condition) Require((condition), #condition, __LINE__)

template <class T>
T ValueOr(absl::StatusOr<T> result, int line) {
  if (!result.ok()) Fail(line, result.status().ToString());
  return *std::move(result);
}
#define VALUE(expression) ValueOr((expression), __LINE__)
#define OK(expression)                                                                       \
  do {                                                                                       \
    if (const absl::Status done = (expression); !done.ok()) Fail(__LINE__, done.ToString()); \
  } while (false)

bool Says(const absl::Status& status, absl::StatusCode code, const char* words) {
  const bool says =
      status.code() == code && std::string(status.message()).find(words) != std::string::npos;
  if (!says) std::fprintf(stderr, "the status was: %s\n", status.ToString().c_str());
  return says;
}

StackConfig Config() {
  StackConfig config{.batch_size = 4, .max_seq_length = 20, .hidden_size = 32, .heads = 4};
  config.num_hidden_layers = 2;
  config.attn_dropout_ratio = 0.1;
  config.hidden_dropout_ratio = 0.1;
  config.seed = 3;
  return config;
}

void Fill(const Tensor& tensor, double pace) {
  for (size_t i = 0; i < tensor.size(); ++i) {
    tensor.floats()[i] = static_cast<float>(std::sin(pace * static_cast<double>(i)));
  }
}

struct Trained {
  std::vector<double> losses;
  std::vector<float> weights;  // of all parameters, one after another
};

std::vector<float> Flatten(const std::vector<NamedTensor>& tensors) {
  std::vector<float> values;
  for (const NamedTensor& named : tensors) {
    values.insert(values.end(), named.tensor.floats().begin(), named.tensor.floats().end());
  }
  return values;
}

// kSteps of AdamW towards a fixed target, with dropout, on a stack of its own, which `maker` makes
// where that is given. It stays there: what makes and deletes it is not repeated when its answer is
// lost.
Trained Train(const Client& client, const SessionOptions& options, const std::string& name,
              Transport transport, const Client* maker = nullptr) {
  const Session session = VALUE(client.OpenSession(options));
  if (maker != nullptr) VALUE(maker->CreateStack(name, Config()));
  const Stack stack =
      VALUE(maker != nullptr ? session.OpenStack(name) : session.CreateStack(name, Config()));
  const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
  const Tensor y = VALUE(session.NewTensor(DType::kFloat32, kShape));
  const Tensor dx = VALUE(session.NewTensor(DType::kFloat32, kShape));
  REQUIRE(session.transport() == transport);
  REQUIRE(x.in_region() == (transport == Transport::kMemfd));
  Fill(x, 0.7);
  Trained trained;
  for (int step = 1; step <= kSteps; ++step) {
    ForwardResult forward = VALUE(stack.Forward(x, {.output = y}));
    REQUIRE(forward.input_transport == transport && forward.output_transport == transport);
    REQUIRE(static_cast<bool>(forward.context));
    double loss = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      const float error = y.floats()[i] - 0.5f;
      loss += error * error / static_cast<double>(y.size());
      y.floats()[i] = 2 * error / static_cast<float>(y.size());
    }
    trained.losses.push_back(loss);
    const BackwardResult backward = VALUE(stack.Backward(forward.context, y, {.input_grad = dx}));
    REQUIRE(!forward.context);
    REQUIRE(backward.input_grad.data() == dx.data());
    const ApplyResult applied = VALUE(stack.ApplyGradients(
        {.learning_rate = 5e-3, .weight_decay = 0.01, .max_grad_norm = 1, .zero_gradients = true}));
    REQUIRE(applied.applied && applied.step == step && applied.grad_norm > 0);
  }
  const auto weights = [&name](const Session& reader) {
    return Flatten(VALUE(VALUE(reader.OpenStack(name)).GetParameters()));
  };
  // More bytes than may get through an unsteady connection at once.
  trained.weights = maker == nullptr ? weights(session) : weights(VALUE(maker->OpenSession()));
  const StackInfo info = VALUE(stack.Describe());
  REQUIRE(info.step == kSteps);
  REQUIRE(info.forward_count == kSteps);
  REQUIRE(info.outstanding_contexts == 0);
  REQUIRE(static_cast<int64_t>(trained.weights.size()) == info.parameter_count);
  return trained;
}

void CheckTraining(const Client& client) {
  const Trained regions =
      Train(client, {.transport = TransportPolicy::kRegions}, "regions", Transport::kMemfd);
  REQUIRE(regions.losses.back() < 0.8 * regions.losses.front());
  const Trained inlined =
      Train(client, {.transport = TransportPolicy::kInline}, "inline", Transport::kInline);
  REQUIRE(regions.losses == inlined.losses);
  REQUIRE(regions.weights == inlined.weights);
  OK(client.DeleteStack("regions"));
  OK(client.DeleteStack("inline"));
}

// `client` goes through a proxy that loses answers, `steady` does not. A call that ran twice would
// draw another dropout mask, add its gradients twice or step twice: the numbers would differ.
void CheckLostAnswers(const Client& client, const Client& steady) {
  const SessionOptions options{.transport = TransportPolicy::kInline,
                               .keep_alive = false,
                               .retry_budget = std::chrono::seconds(20)};
  const Trained flaky = Train(client, options, "flaky", Transport::kInline);
  const Trained direct = Train(steady, options, "direct", Transport::kInline);
  REQUIRE(flaky.losses == direct.losses);
  REQUIRE(flaky.weights == direct.weights);
  OK(steady.DeleteStack("flaky"));
  OK(steady.DeleteStack("direct"));
}

// `client` goes through a proxy that ends its connections again and again.
void CheckCuts(const Client& client, const Client& steady, bool inlined) {
  const Transport transport = inlined ? Transport::kInline : Transport::kMemfd;
  const SessionOptions options{
      .transport = inlined ? TransportPolicy::kInline : TransportPolicy::kRegions,
      .resume_grace = std::chrono::seconds(30)};
  const Trained cut = Train(client, options, "cut", transport, &steady);
  const Trained direct = Train(steady, options, "direct", transport);
  REQUIRE(cut.losses == direct.losses);
  REQUIRE(cut.weights == direct.weights);
  OK(steady.DeleteStack("cut"));
  OK(steady.DeleteStack("direct"));
}

// Has the driver do something to the connections: "cut", "down" or "up".
void Ask(const char* what) {
  std::puts(what);
  std::fflush(stdout);
  REQUIRE(std::getchar() == '\n');
}

// `client` goes through a proxy that does what Ask says.
void CheckResume(const Client& client, const Client& steady) {
  using std::chrono::milliseconds;
  VALUE(steady.CreateStack("resume", Config()));
  const auto outstanding = [&] { return VALUE(steady.GetStack("resume")).outstanding_contexts; };
  {
    const Session session = VALUE(client.OpenSession({.transport = TransportPolicy::kRegions}));
    REQUIRE(session.resume_grace() == std::chrono::seconds(10));
    REQUIRE(VALUE(steady.OpenSession()).resume_grace().count() == 0);  // over a Unix socket
    const Stack stack = VALUE(session.OpenStack("resume"));
    const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
    Fill(x, 0.3);
    // A context and a region outlive the connection.
    ForwardResult forward = VALUE(stack.Forward(x));
    Ask("cut");
    VALUE(stack.Backward(forward.context, x));
    OK(session.status());
    // So do what is given back and what is made.
    ForwardResult dropped = VALUE(stack.Forward(x));
    REQUIRE(outstanding() == 1);
    Ask("cut");
    dropped.context = Context();
    REQUIRE(outstanding() == 0);
    Ask("cut");
    const Tensor y = VALUE(session.NewTensor(DType::kFloat32, kShape));
    VALUE(stack.Forward(x, {.output = y, .training = false}));
    // A call waits for the connection.
    Ask("down");
    absl::StatusOr<ApplyResult> applied = absl::UnknownError("not yet");
    std::thread call([&] { applied = stack.ApplyGradients({.learning_rate = 1e-3}); });
    std::this_thread::sleep_for(milliseconds(500));
    REQUIRE(applied.status().code() == absl::StatusCode::kUnknown);
    Ask("up");
    call.join();
    REQUIRE(VALUE(std::move(applied)).step == 1);
  }
  {
    // Not for longer than the grace.
    const Session session = VALUE(client.OpenSession(
        {.transport = TransportPolicy::kRegions, .resume_grace = milliseconds(700)}));
    const Stack stack = VALUE(session.OpenStack("resume"));
    const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
    ForwardResult forward = VALUE(stack.Forward(x));
    Ask("down");
    const absl::Status over = stack.Backward(forward.context, x).status();
    REQUIRE(Says(over, absl::StatusCode::kUnavailable, "not back within 0.7 s"));
    REQUIRE(Says(session.status(), absl::StatusCode::kUnavailable, "lease ended"));
    x.floats()[0] = 1;  // still mapped
    for (int i = 0; i < 500 && outstanding() > 0; ++i)
      std::this_thread::sleep_for(milliseconds(10));
    REQUIRE(outstanding() == 0);
    Ask("up");
    REQUIRE(!stack.Forward(x).ok());
  }
  // Whoever wants none has none, and whoever asks for less is told.
  {
    const Session session = VALUE(client.OpenSession({.resume_grace = milliseconds(0)}));
    Ask("cut");
    for (int i = 0; i < 500 && session.status().ok(); ++i) {
      std::this_thread::sleep_for(milliseconds(10));
    }
    REQUIRE(Says(session.status(), absl::StatusCode::kUnavailable, "lease ended"));
  }
  REQUIRE(Says(client.OpenSession({.resume_grace = milliseconds(-1)}).status(),
               absl::StatusCode::kInvalidArgument, "resume_grace_seconds"));
  // A session that is closed while it has no connection waits a moment for it.
  Session session = VALUE(client.OpenSession({.resume_grace = milliseconds(5000)}));
  Ask("down");
  absl::Status closed = absl::UnknownError("not yet");
  std::thread closing([&] { closed = session.Close(); });
  Ask("up");
  closing.join();
  OK(closed);
  OK(steady.DeleteStack("resume"));
}

void CheckParameters(const Client& client) {
  const Session session = VALUE(client.OpenSession());
  const Stack stack = VALUE(session.CreateStack("parameters", Config()));
  const std::vector<std::string> names = {"layers.1.inter_w", "layers.0.attn_qb"};
  std::vector<NamedTensor> some = VALUE(stack.GetParameters(names));
  REQUIRE(some.size() == 2 && some[0].name == names[0] && some[1].name == names[1]);
  REQUIRE((some[0].tensor.shape() == Shape{128, 32}) && (some[1].tensor.shape() == Shape{32}));

  // Into a region of ours, and all of them.
  const Tensor target = VALUE(session.NewTensor(DType::kFloat32, {stack.info().parameter_count}));
  const std::vector<NamedTensor> all = VALUE(stack.GetParameters({}, {.target = target}));
  REQUIRE(all.size() == stack.info().parameters.size());
  REQUIRE(all.front().tensor.data() == target.data());
  REQUIRE(Flatten(all) == Flatten(VALUE(stack.GetParameters())));

  // Write from this process's memory, then from the region.
  Fill(some[0].tensor, 0.1);
  Fill(some[1].tensor, 0.2);
  OK(stack.SetParameters(some));
  REQUIRE(Flatten(VALUE(stack.GetParameters(names))) == Flatten(some));
  OK(stack.SetParameters(all));
  REQUIRE(Flatten(VALUE(stack.GetParameters())) == Flatten(all));

  // All or none: a wrong shape beside a right one.
  const Tensor wrong = VALUE(Tensor::Allocate(DType::kFloat32, {31}));
  const absl::Status refused = stack.SetParameters({some[0], {names[1], wrong}});
  REQUIRE(Says(refused, absl::StatusCode::kInvalidArgument, "tensors[1]"));
  REQUIRE(Flatten(VALUE(stack.GetParameters())) == Flatten(all));
  REQUIRE(Says(stack.GetParameters({"layers.9.inter_w"}).status(), absl::StatusCode::kNotFound,
               "layers.9.inter_w"));

  // Gradients: zero, then not, then zero again.
  const auto norm = [&](const std::vector<NamedTensor>& tensors) {
    double sum = 0;
    for (const float value : Flatten(tensors)) sum += double{value} * value;
    return std::sqrt(sum);
  };
  REQUIRE(norm(VALUE(stack.GetGradients())) == 0);
  const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
  Fill(x, 0.3);
  ForwardResult forward = VALUE(stack.Forward(x));
  REQUIRE(!forward.output.in_region() && forward.output.shape() == kShape);
  const BackwardResult backward =
      VALUE(stack.Backward(forward.context, forward.output, {.want_input_grad = true}));
  REQUIRE(backward.input_grad.shape() == kShape);
  REQUIRE(backward.output_transport == Transport::kInline);
  const double streamed = norm(VALUE(stack.GetGradients()));
  REQUIRE(streamed > 0);
  REQUIRE(norm(VALUE(stack.GetGradients({}, {.target = target}))) == streamed);
  OK(stack.ZeroGradients());
  REQUIRE(norm(VALUE(stack.GetGradients())) == 0);
  OK(client.DeleteStack("parameters"));
}

// More than one message may carry inline: written through a temporary region.
void CheckLargeParameters(const Client& client) {
  const uint64_t cap = VALUE(client.Info()).inline_cap_bytes;
  const Session session = VALUE(client.OpenSession());
  StackConfig config{.batch_size = 1, .max_seq_length = 1, .hidden_size = 64, .heads = 1};
  config.intermediate_size = static_cast<int64_t>(cap / 4 / 64) + 1;
  config.num_hidden_layers = 1;
  const Stack stack = VALUE(session.CreateStack("large", config));
  const std::vector<NamedTensor> values =
      VALUE(stack.GetParameters({"layers.0.inter_w", "layers.0.output_w"}));
  REQUIRE(values[0].tensor.bytes() > cap);
  Fill(values[0].tensor, 0.1);
  Fill(values[1].tensor, 0.2);
  OK(stack.SetParameters(values));
  REQUIRE(Flatten(VALUE(stack.GetParameters({"layers.0.inter_w", "layers.0.output_w"}))) ==
          Flatten(values));
  OK(client.DeleteStack("large"));
}

void CheckContexts(const Client& client) {
  const Session session = VALUE(client.OpenSession());
  const Stack stack = VALUE(session.CreateStack("contexts", Config()));
  const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
  const auto outstanding = [&] { return VALUE(stack.Describe()).outstanding_contexts; };
  {
    const ForwardResult dropped = VALUE(stack.Forward(x));
    REQUIRE(outstanding() == 1);
    // An evaluation keeps none.
    REQUIRE(!VALUE(stack.Forward(x, {.training = false})).context);
    REQUIRE(outstanding() == 1);
  }
  REQUIRE(outstanding() == 0);
  Context kept = std::move(VALUE(stack.Forward(x)).context);
  Context moved = std::move(kept);
  REQUIRE(!kept && moved && outstanding() == 1);  // NOLINT: a moved-from context is none
  REQUIRE(Says(stack.Backward(kept, x).status(), absl::StatusCode::kFailedPrecondition, "Forward"));
  // A Backward that is refused leaves the context as it was.
  const Tensor small = VALUE(session.NewTensor(DType::kFloat32, {1, 17, 32}));
  REQUIRE(Says(stack.Backward(moved, small).status(), absl::StatusCode::kInvalidArgument,
               "output_grad"));
  REQUIRE(moved && outstanding() == 1);
  VALUE(stack.Backward(moved, x));
  REQUIRE(!moved && outstanding() == 0);
  OK(client.DeleteStack("contexts"));
}

void CheckSessions(const Client& client) {
  Session session = VALUE(client.OpenSession({.client_name = "consumer"}));
  const Stack stack = VALUE(session.CreateStack("sessions", Config()));
  REQUIRE(Says(session.OpenStack("nobody").status(), absl::StatusCode::kNotFound, "nobody"));
  REQUIRE(Says(session.CreateStack("sessions", Config()).status(), absl::StatusCode::kAlreadyExists,
               "sessions"));

  // A region by hand, two tensors in it.
  const Region region = VALUE(session.CreateRegion(10000));
  REQUIRE(region.size() >= 10000 && region.size() % 4096 == 0);
  const size_t bytes = 3 * 17 * 32 * 4;
  const Tensor x = VALUE(region.View(DType::kFloat32, kShape));
  REQUIRE(!region.View(DType::kFloat32, kShape, region.size() - bytes + 4).ok());
  const Region second = VALUE(session.CreateRegion(bytes));
  const Tensor y = VALUE(second.View(DType::kFloat32, kShape));
  Fill(x, 0.4);
  VALUE(stack.Forward(x, {.output = y, .training = false}));
  REQUIRE(std::isfinite(y.floats()[0]) && y.floats()[0] != 0);
  // The daemon sees later writes: it reads this very memory.
  const float before = y.floats()[5];
  x.floats()[5] += 1;
  VALUE(stack.Forward(x, {.output = y, .training = false}));
  REQUIRE(y.floats()[5] != before);

  const Session other = VALUE(client.OpenSession());
  const Stack others = VALUE(other.OpenStack("sessions"));
  REQUIRE(Says(others.Forward(x, {.training = false}).status(), absl::StatusCode::kInvalidArgument,
               "another session"));
  const Session inline_only = VALUE(client.OpenSession({.transport = TransportPolicy::kInline}));
  REQUIRE(
      Says(inline_only.CreateRegion(1).status(), absl::StatusCode::kFailedPrecondition, "kInline"));
  const Session nowhere = VALUE(client.OpenSession({.broker_path = "/nowhere/b.sock"}));
  REQUIRE(!VALUE(nowhere.NewTensor(DType::kFloat32, {4})).in_region());
  REQUIRE(nowhere.transport() == Transport::kInline);
  REQUIRE(nowhere.transport_reason().find("/nowhere/b.sock") != std::string::npos);
  const Session strict = VALUE(client.OpenSession(
      {.transport = TransportPolicy::kRegions, .broker_path = "/nowhere/b.sock"}));
  REQUIRE(Says(strict.NewTensor(DType::kFloat32, {4}).status(), absl::StatusCode::kUnavailable,
               "/nowhere/b.sock"));

  // After the end the memory is still there, the calls are not.
  OK(session.Close());
  REQUIRE(Says(session.status(), absl::StatusCode::kFailedPrecondition, "closed"));
  REQUIRE(Says(stack.Forward(x).status(), absl::StatusCode::kFailedPrecondition, "closed"));
  x.floats()[0] = 1;
  OK(session.Close());
  OK(client.DeleteStack("sessions"));
}

// Longer than the lease without a call: the thread holds it.
void CheckLease(const Client& client) {
  const Session held = VALUE(client.OpenSession());
  const Session dropped = VALUE(client.OpenSession({.keep_alive = false}));
  const Stack held_stack = VALUE(held.CreateStack("lease", Config()));
  const Stack dropped_stack = VALUE(dropped.OpenStack("lease"));
  const Tensor x = VALUE(Tensor::Allocate(DType::kFloat32, kShape));
  std::this_thread::sleep_for(2 * held.lease());
  VALUE(held_stack.Forward(x));
  REQUIRE(Says(dropped_stack.Forward(x).status(), absl::StatusCode::kNotFound, "session"));
  OK(client.DeleteStack("lease"));
}

// The driver kills the daemon after "ready".
void CheckLoss(const Client& client) {
  const Session session = VALUE(client.OpenSession({.retry_budget = std::chrono::milliseconds(0)}));
  const Stack stack = VALUE(session.CreateStack("loss", Config()));
  const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
  const ForwardResult forward = VALUE(stack.Forward(x));
  std::puts("ready");
  std::fflush(stdout);
  // At once, not at the next beat of the lease.
  for (int i = 0; i < 300 && session.status().ok(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  REQUIRE(Says(session.status(), absl::StatusCode::kUnavailable, "lease ended"));
  REQUIRE(Says(stack.Forward(x).status(), absl::StatusCode::kUnavailable, "lease ended"));
  x.floats()[0] = 1;  // still mapped
}

// Several threads on one session: their mutations queue up, none is lost.
void CheckThreads(const Client& client) {
  constexpr int kThreads = 4;
  constexpr int kCalls = 10;
  const Session session = VALUE(client.OpenSession());
  StackConfig config = Config();
  config.max_contexts = kThreads;
  const Stack stack = VALUE(session.CreateStack("threads", config));
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
      Fill(x, 0.2);
      for (int call = 0; call < kCalls; ++call) {
        ForwardResult forward = VALUE(stack.Forward(x));
        VALUE(stack.Backward(forward.context, x));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  REQUIRE(VALUE(stack.Describe()).forward_count == kThreads * kCalls);
  OK(client.DeleteStack("threads"));
}

// The losses and weights of Train, with every step's calls sent before the first is answered.
void CheckPipeline(const Client& client) {
  for (const TransportPolicy policy : {TransportPolicy::kRegions, TransportPolicy::kInline}) {
    const Transport transport =
        policy == TransportPolicy::kRegions ? Transport::kMemfd : Transport::kInline;
    const Session session = VALUE(client.OpenSession({.transport = policy}));
    StackConfig config = Config();
    config.max_contexts = 3;
    const Stack piped = VALUE(session.CreateStack("piped", config));
    const Stack single = VALUE(session.CreateStack("single", config));
    const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
    const Tensor y = VALUE(session.NewTensor(DType::kFloat32, kShape));
    const Tensor dy = VALUE(session.NewTensor(DType::kFloat32, kShape));
    const Tensor dx = VALUE(session.NewTensor(DType::kFloat32, kShape));
    Fill(x, 0.7);
    Fill(dy, 0.3);
    const OptimizerOptions optimizer{
        .learning_rate = 5e-3, .max_grad_norm = 1, .zero_gradients = true};

    Pipeline pipeline = VALUE(session.OpenPipeline({.depth = 7}));
    std::vector<Pending<ForwardResult>> forwards;
    std::vector<Pending<BackwardResult>> backwards;
    std::vector<Pending<ApplyResult>> applied;
    for (int step = 0; step < kSteps; ++step) {
      forwards.push_back(pipeline.Forward(piped, x, {.output = y}));
      backwards.push_back(pipeline.Backward(piped, forwards.back(), dy,
                                            {.input_grad = dx, .want_input_grad = true}));
      applied.push_back(pipeline.ApplyGradients(piped, optimizer));
    }
    for (int step = 0; step < kSteps; ++step) {
      ForwardResult forward = VALUE(single.Forward(x));
      REQUIRE(VALUE(forwards[step].Take()).output_transport == transport);
      REQUIRE(Says(forwards[step].Take().status(), absl::StatusCode::kFailedPrecondition, "taken"));
      VALUE(single.Backward(forward.context, dy));
      VALUE(backwards[step].Take());
      const ApplyResult one = VALUE(single.ApplyGradients(optimizer));
      const ApplyResult other = VALUE(applied[step].Take());
      REQUIRE(one.grad_norm == other.grad_norm && one.step == other.step);
    }
    OK(pipeline.Wait());
    REQUIRE(Flatten(VALUE(piped.GetParameters())) == Flatten(VALUE(single.GetParameters())));

    // A failure is its own; mutations behind it change nothing; evaluations go on.
    const int64_t step = VALUE(piped.Describe()).step;
    Tensor wrong = VALUE(session.NewTensor(DType::kFloat32, {1, 1, 31}));
    Pending<ForwardResult> failing = pipeline.Forward(piped, wrong);
    Pending<BackwardResult> behind = pipeline.Backward(piped, failing, dy);
    Pending<ApplyResult> last = pipeline.ApplyGradients(piped, optimizer);
    Pending<ForwardResult> evaluation = pipeline.Forward(piped, x, {.training = false});
    REQUIRE(Says(failing.Wait(), absl::StatusCode::kInvalidArgument, "input"));
    REQUIRE(behind.Wait().code() == absl::StatusCode::kFailedPrecondition);
    REQUIRE(last.Wait().code() == absl::StatusCode::kFailedPrecondition);
    OK(evaluation.Wait());
    REQUIRE(
        Says(pipeline.ZeroGradients(piped).Wait(), absl::StatusCode::kFailedPrecondition, "Wait"));
    REQUIRE(Says(pipeline.Wait(), absl::StatusCode::kInvalidArgument, "input"));
    OK(pipeline.ZeroGradients(piped).Wait());
    REQUIRE(VALUE(piped.Describe()).step == step);

    // Contexts: one at hand, one of a forward that is done, one that nobody wants.
    ForwardResult at_hand = VALUE(piped.Forward(x));
    OK(pipeline.Backward(piped, at_hand.context, dy).Wait());
    REQUIRE(!at_hand.context);
    Pending<ForwardResult> ready = pipeline.Forward(piped, x);
    OK(ready.Wait());
    OK(pipeline.Backward(piped, ready, dy).Wait());
    REQUIRE(Says(pipeline.Backward(piped, ready, dy).Wait(), absl::StatusCode::kFailedPrecondition,
                 "context"));
    REQUIRE(Says(pipeline.Backward(piped, evaluation, dy).Wait(),
                 absl::StatusCode::kFailedPrecondition, "context"));
    VALUE(pipeline.Forward(piped, x).Take());
    Pending<ForwardResult> unlucky = pipeline.Forward(piped, x);
    REQUIRE(pipeline.Backward(piped, unlucky, wrong).Wait().code() ==
            absl::StatusCode::kInvalidArgument);
    REQUIRE(VALUE(unlucky.Take()).context.id().empty());
    REQUIRE(pipeline.Wait().code() == absl::StatusCode::kInvalidArgument);
    REQUIRE(VALUE(piped.Describe()).outstanding_contexts == 0);

    // The session's own calls and the pipeline's take turns.
    for (int i = 0; i < 5; ++i) {
      Pending<ForwardResult> forward = pipeline.Forward(piped, x);
      Pending<BackwardResult> backward = pipeline.Backward(piped, forward, dy);
      OK(piped.ZeroGradients());
      OK(backward.Wait());
    }
    const Session other = VALUE(client.OpenSession());
    const Stack foreign = VALUE(other.OpenStack("piped"));
    REQUIRE(
        Says(pipeline.Forward(foreign, x).Wait(), absl::StatusCode::kInvalidArgument, "session"));
    REQUIRE(Says(session.OpenPipeline({.depth = 64}).status(), absl::StatusCode::kInvalidArgument,
                 "1..63"));
    pipeline.Close();
    REQUIRE(Says(pipeline.ZeroGradients(piped).Wait(), absl::StatusCode::kFailedPrecondition,
                 "closed"));
    OK(client.DeleteStack("piped"));
    OK(client.DeleteStack("single"));
  }
}

// What a pipeline's end leaves open is settled: no call ran twice, none is lost from the sequence.
void CheckPipelineBreaks(const Client& client) {
  const Session session = VALUE(client.OpenSession());
  StackConfig config{.batch_size = 8, .max_seq_length = 64, .hidden_size = 256, .heads = 4};
  config.num_hidden_layers = 2;
  config.max_contexts = 4;
  const Stack stack = VALUE(session.CreateStack("breaks", config));
  const Tensor x = VALUE(session.NewTensor(DType::kFloat32, {8, 64, 256}));
  Fill(x, 0.7);
  uint64_t heard = 0;
  for (int round = 0; round < 6; ++round) {
    // The stream's time is over with some calls run, one running, others waiting.
    Pipeline pipeline =
        VALUE(session.OpenPipeline({.timeout = std::chrono::milliseconds(20 + 25 * round)}));
    std::vector<Pending<ForwardResult>> forwards;
    std::vector<Pending<BackwardResult>> backwards;
    const Tensor y = VALUE(session.NewTensor(DType::kFloat32, x.shape()));
    for (int i = 0; i < 15; ++i) {
      forwards.push_back(pipeline.Forward(stack, x, {.output = y}));
      backwards.push_back(pipeline.Backward(stack, forwards.back(), y));
    }
    for (const Pending<ForwardResult>& forward : forwards) heard += forward.Wait().ok();
    const absl::Status end = pipeline.Wait();
    REQUIRE(!end.ok());
    REQUIRE(Says(pipeline.ZeroGradients(stack).Wait(), end.code(), ""));
    pipeline.Close();
    // The session goes on, in step with the daemon, and holds no context.
    OK(stack.ZeroGradients());
    ForwardResult forward = VALUE(stack.Forward(x, {.output = y}));
    ++heard;
    VALUE(stack.Backward(forward.context, x));
    const StackInfo info = VALUE(stack.Describe());
    REQUIRE(info.outstanding_contexts == 0);
    REQUIRE(info.forward_count >= heard);
  }
  // One that is closed while a call of it waits for another's turn.
  {
    const Tensor out = VALUE(session.NewTensor(DType::kFloat32, x.shape()));
    Pipeline busy = VALUE(session.OpenPipeline());
    for (int i = 0; i < 10; ++i) {
      busy.Backward(stack, busy.Forward(stack, x, {.output = out}), out);
    }
    Pipeline waiting = VALUE(session.OpenPipeline());
    absl::Status refused;
    std::thread caller([&] { refused = waiting.ZeroGradients(stack).Wait(); });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    waiting.Close();
    caller.join();
    REQUIRE(Says(refused, absl::StatusCode::kFailedPrecondition, "closed"));
    OK(busy.Wait());
    OK(stack.ZeroGradients());
  }
  // A call that waits is cancelled; a call's own timeout is its own.
  Pipeline pipeline = VALUE(session.OpenPipeline());
  std::vector<Pending<ForwardResult>> busy;
  const Tensor y = VALUE(session.NewTensor(DType::kFloat32, x.shape()));
  for (int i = 0; i < 10; ++i) {
    busy.push_back(pipeline.Forward(stack, x, {.output = y, .training = false}));
  }
  Pending<ForwardResult> late =
      pipeline.Forward(stack, x, {.output = y, .training = false}, std::chrono::milliseconds(1));
  Pending<Done> unwanted = pipeline.ZeroGradients(stack);
  REQUIRE(unwanted.Cancel());
  REQUIRE(unwanted.Wait().code() == absl::StatusCode::kCancelled);
  REQUIRE(!unwanted.Cancel());
  REQUIRE(late.Wait().code() == absl::StatusCode::kDeadlineExceeded);
  for (const Pending<ForwardResult>& forward : busy) OK(forward.Wait());
  REQUIRE(pipeline.Wait().code() == absl::StatusCode::kCancelled);
  OK(client.DeleteStack("breaks"));
}

double RelativeError(std::span<const float> a, std::span<const float> b) {
  REQUIRE(a.size() == b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = double{a[i]} - b[i];
    difference += error * error;
    norm += double{b[i]} * b[i];
  }
  return std::sqrt(difference / norm);
}

// A packed batch gives what its sequences give one by one.
void CheckPacked(const Client& client) {
  const Session session = VALUE(client.OpenSession());
  StackConfig config = Config();
  config.attn_dropout_ratio = config.hidden_dropout_ratio = 0;
  config.causal = true;
  const Stack stack = VALUE(session.CreateStack("packed", config));
  const std::vector<int32_t> ends = {0, 3, 20, 21, 30, 41};  // more sequences than batch_size
  const int64_t tokens = ends.back();
  const Tensor x = VALUE(session.NewTensor(DType::kFloat32, {tokens, 32}));
  const Tensor y = VALUE(session.NewTensor(DType::kFloat32, {tokens, 32}));
  const Tensor dx = VALUE(session.NewTensor(DType::kFloat32, {tokens, 32}));
  const Tensor offsets =
      VALUE(session.NewTensor(DType::kInt32, {static_cast<int64_t>(ends.size())}));
  std::copy(ends.begin(), ends.end(), offsets.ints().begin());
  Fill(x, 0.7);
  ForwardResult forward = VALUE(stack.Forward(x, {.output = y, .cumulative_lengths = offsets}));
  REQUIRE(forward.attention_path == AttentionPath::kFused);  // all that the CPU has
  VALUE(stack.Backward(forward.context, x, {.input_grad = dx}));
  const std::vector<float> gradients = Flatten(VALUE(stack.GetGradients()));
  OK(stack.ZeroGradients());
  std::vector<float> single_y, single_dx;
  for (size_t i = 0; i + 1 < ends.size(); ++i) {
    const Shape shape = {1, ends[i + 1] - ends[i], 32};
    const Tensor one =
        VALUE(x.View(DType::kFloat32, shape, static_cast<size_t>(ends[i]) * 32 * sizeof(float)));
    ForwardResult its = VALUE(stack.Forward(one));
    const BackwardResult back = VALUE(stack.Backward(its.context, one, {.want_input_grad = true}));
    for (const float value : its.output.floats()) single_y.push_back(value);
    for (const float value : back.input_grad.floats()) single_dx.push_back(value);
  }
  // fp32 sums in another order.
  REQUIRE(RelativeError(y.floats(), single_y) < 2e-6);
  REQUIRE(RelativeError(dx.floats(), single_dx) < 2e-6);
  REQUIRE(RelativeError(gradients, Flatten(VALUE(stack.GetGradients()))) < 2e-6);

  const auto refused = [&](int32_t value, const char* words) {
    offsets.ints()[2] = value;
    return Says(stack.Forward(x, {.cumulative_lengths = offsets}).status(),
                absl::StatusCode::kInvalidArgument, words);
  };
  REQUIRE(refused(2, "cumulative_lengths[2]: is 2; it must be in 4..23"));
  REQUIRE(refused(24, "cumulative_lengths[2]: is 24; it must be in 4..23"));
  const Tensor lengths = VALUE(session.NewTensor(DType::kInt32, {4}));
  REQUIRE(Says(stack.Forward(x, {.lengths = lengths, .cumulative_lengths = offsets}).status(),
               absl::StatusCode::kInvalidArgument, "one of them"));
  OK(client.DeleteStack("packed"));
}

// Every setting there and back, and what a live stack may change.
void CheckSettings(const Client& client) {
  StackConfig config = Config();
  config.normalize_invertible = config.gelu_checkpoint = config.attn_dropout_checkpoint = true;
  config.activation_checkpointing = config.stochastic_mode = config.causal = true;
  config.dynamic_loss_scale = true;
  config.initial_loss_scale = 512;
  config.loss_scale_growth_interval = 7;
  config.loss_scale_growth_factor = 1.5;
  config.loss_scale_backoff_factor = 0.25;
  config.loss_scale_hysteresis = 3;
  config.min_loss_scale = 0.5;
  const StackInfo made = VALUE(client.CreateStack("settings", config));
  REQUIRE(made.config.normalize_invertible && made.config.gelu_checkpoint);
  REQUIRE(made.config.attn_dropout_checkpoint && made.config.activation_checkpointing);
  REQUIRE(made.config.stochastic_mode && made.config.causal && made.config.dynamic_loss_scale);
  REQUIRE(made.config.initial_loss_scale == 512 && made.config.loss_scale_growth_interval == 7);
  REQUIRE(made.config.loss_scale_growth_factor == 1.5);
  REQUIRE(made.config.loss_scale_backoff_factor == 0.25 && made.config.loss_scale_hysteresis == 3);
  REQUIRE(made.config.min_loss_scale == 0.5 && made.loss_scale == 512);

  const StackInfo plain = VALUE(client.UpdateStack("settings", {.normalize_invertible = false,
                                                                .gelu_checkpoint = false,
                                                                .attn_dropout_checkpoint = false,
                                                                .activation_checkpointing = false,
                                                                .stochastic_mode = false}));
  REQUIRE(!plain.config.normalize_invertible && !plain.config.gelu_checkpoint);
  REQUIRE(!plain.config.attn_dropout_checkpoint && !plain.config.activation_checkpointing);
  REQUIRE(!plain.config.stochastic_mode);
  REQUIRE(plain.plan.Bytes(MemoryKind::kActivations) > made.plan.Bytes(MemoryKind::kActivations));
  const Session session = VALUE(client.OpenSession());
  const Stack stack = VALUE(session.OpenStack("settings"));
  const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
  const ForwardResult forward = VALUE(stack.Forward(x));
  REQUIRE(Says(client.UpdateStack("settings", {.gelu_checkpoint = true}).status(),
               absl::StatusCode::kFailedPrecondition, "context"));
  OK(client.DeleteStack("settings"));
}

void CheckOptimizers(const Client& client) {
  const Session session = VALUE(client.OpenSession());
  StackConfig config = Config();
  config.dynamic_loss_scale = true;
  config.initial_loss_scale = 256;
  config.loss_scale_growth_interval = 1;
  config.loss_scale_hysteresis = 1;
  const Stack stack = VALUE(session.CreateStack("optimizers", config));
  const Tensor x = VALUE(session.NewTensor(DType::kFloat32, kShape));
  Fill(x, 0.7);
  const auto step = [&](const Tensor& output_grad, const OptimizerOptions& options) {
    ForwardResult forward = VALUE(stack.Forward(x));
    VALUE(stack.Backward(forward.context, output_grad));
    return VALUE(stack.ApplyGradients(options));
  };
  const OptimizerOptions lamb{.learning_rate = 1e-3,
                              .zero_gradients = true,
                              .kind = OptimizerKind::kLamb,
                              .adapt_biases_and_norms = true,
                              .min_trust_ratio = 0.01,
                              .max_trust_ratio = 10};
  ApplyResult applied = step(x, lamb);
  REQUIRE(applied.applied && applied.loss_scale == 256 && applied.next_loss_scale == 512);
  const Tensor infinite = VALUE(session.NewTensor(DType::kFloat32, kShape));
  infinite.floats()[0] = std::numeric_limits<float>::infinity();
  applied = step(infinite, lamb);
  REQUIRE(!applied.applied && applied.loss_scale == 512 && applied.next_loss_scale == 256);
  REQUIRE(VALUE(stack.Describe()).loss_scale == 256);
  applied = step(x, AdamW{.learning_rate = 1e-3, .loss_scale = 4, .zero_gradients = true});
  REQUIRE(applied.applied && applied.loss_scale == 4 && applied.step == 2);
  REQUIRE(Says(stack.ApplyGradients({.learning_rate = 1e-3, .min_trust_ratio = 0.5}).status(),
               absl::StatusCode::kInvalidArgument, "min_trust_ratio: is LAMB's"));
  OK(client.DeleteStack("optimizers"));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s TARGET CHECK [TARGET [inline|regions]]\n", argv[0]);
    return 2;
  }
  const std::string check = argv[2];
  const Client client =
      VALUE(Client::Connect(argv[1], {.connect_timeout = std::chrono::seconds(10)}));
  if (check == "training") {
    CheckTraining(client);
  } else if (check == "lost-answers" && argc == 4) {
    CheckLostAnswers(client, VALUE(Client::Connect(argv[3])));
  } else if (check == "cuts" && argc == 5) {
    CheckCuts(client, VALUE(Client::Connect(argv[3])), std::strcmp(argv[4], "inline") == 0);
  } else if (check == "resume" && argc == 4) {
    CheckResume(client, VALUE(Client::Connect(argv[3])));
  } else if (check == "parameters") {
    CheckParameters(client);
  } else if (check == "large-parameters") {
    CheckLargeParameters(client);
  } else if (check == "contexts") {
    CheckContexts(client);
  } else if (check == "sessions") {
    CheckSessions(client);
  } else if (check == "lease") {
    CheckLease(client);
  } else if (check == "loss") {
    CheckLoss(client);
  } else if (check == "pipeline") {
    CheckPipeline(client);
  } else if (check == "pipeline-breaks") {
    CheckPipelineBreaks(client);
  } else if (check == "threads") {
    CheckThreads(client);
  } else if (check == "packed") {
    CheckPacked(client);
  } else if (check == "settings") {
    CheckSettings(client);
  } else if (check == "optimizers") {
    CheckOptimizers(client);
  } else {
    std::fprintf(stderr, "there is no check '%s'\n", check.c_str());
    return 2;
  }
  return 0;
}
