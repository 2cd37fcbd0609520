// Execute: the calls of LayerService on one stream, in order, several in flight.
#include <functional>
#include <limits>
#include <thread>

#include "cli/conformance/busy.h"
#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

// An Execute stream. Its answers are counted as Execute's.
class Calls {
 public:
  explicit Calls(Daemon& daemon) : daemon_(daemon) {
    daemon.Prepare(&context_);
    stream_ = daemon.layers().Execute(&context_);
  }
  ~Calls() {
    if (!finished_) {
      context_.TryCancel();
      stream_->Finish();
    }
  }
  Calls(const Calls&) = delete;
  Calls& operator=(const Calls&) = delete;

  // Sends with the next id, and gives that.
  uint64_t Send(v1::ExecuteRequest request) {
    request.set_id(++last_id_);
    stream_->Write(request);  // where the stream has ended, Read says so
    return last_id_;
  }
  void SendWithId(v1::ExecuteRequest request, uint64_t id) {
    request.set_id(id);
    last_id_ = id;
    stream_->Write(request);
  }
  // The next answer, which must be that of `id`.
  v1::ExecuteResponse Read(uint64_t id) {
    v1::ExecuteResponse response;
    if (!stream_->Read(&response))
      Fail("the stream ends before the answer of ", id, ": ", Describe(End()));
    daemon_.Count(v1::LayerService::service_full_name(), "Execute", StatusOf(response));
    Require(response.id() == id, "the next answer is that of ", response.id(), "; it must be ", id,
            "'s");
    return response;
  }
  v1::ExecuteResponse Ok(uint64_t id) {
    v1::ExecuteResponse response = Read(id);
    const grpc::Status status = StatusOf(response);
    Require(status.ok(), "call ", id, " answers ", Describe(status));
    return response;
  }
  void Refuses(uint64_t id, Code code, std::initializer_list<absl::string_view> words = {}) {
    const v1::ExecuteResponse response = Read(id);
    Daemon::Refused(absl::StrCat("call ", id), StatusOf(response), code, words);
    Require(response.result_case() == v1::ExecuteResponse::RESULT_NOT_SET, "call ", id, " answers ",
            CodeName(code), " and a result");
  }
  void NoMore() { stream_->WritesDone(); }
  void Cancel() { context_.TryCancel(); }
  // How the stream ended; reads what is left.
  grpc::Status End() {
    v1::ExecuteResponse left;
    while (stream_->Read(&left)) {
    }
    finished_ = true;
    const grpc::Status status = stream_->Finish();
    daemon_.Count(v1::LayerService::service_full_name(), "Execute", status);
    return status;
  }
  void EndsWell() {
    NoMore();
    const grpc::Status status = End();
    Require(status.ok(), "the stream ends with ", Describe(status));
  }

 private:
  static grpc::Status StatusOf(const v1::ExecuteResponse& response) {
    return grpc::Status(static_cast<Code>(response.code()), response.message());
  }
  Daemon& daemon_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::ExecuteRequest, v1::ExecuteResponse>> stream_;
  uint64_t last_id_ = 0;
  bool finished_ = false;
};

v1::ExecuteRequest Item(const v1::ForwardRequest& call) {
  v1::ExecuteRequest item;
  *item.mutable_forward() = call;
  return item;
}

v1::ExecuteRequest Item(const v1::BackwardRequest& call, uint64_t context_of = 0) {
  v1::ExecuteRequest item;
  *item.mutable_backward() = call;
  item.set_context_of(context_of);
  return item;
}

v1::ExecuteRequest Item(const v1::ApplyGradientsRequest& call) {
  v1::ExecuteRequest item;
  *item.mutable_apply_gradients() = call;
  return item;
}

v1::ExecuteRequest Item(const v1::ZeroGradientsRequest& call) {
  v1::ExecuteRequest item;
  *item.mutable_zero_gradients() = call;
  return item;
}

v1::ExecuteRequest Item(const v1::ReleaseContextRequest& call, uint64_t context_of = 0) {
  v1::ExecuteRequest item;
  *item.mutable_release_context() = call;
  item.set_context_of(context_of);
  return item;
}

v1::ExecuteRequest CancelOf(uint64_t id) {
  v1::ExecuteRequest item;
  item.set_cancel(id);
  return item;
}

// Two training micro-batches, a step and a release, everything sent before anything is read, give
// what single calls give on a twin.
void PipelinesLikeSingleCalls(Daemon& daemon) {
  Rig single(daemon), piped(daemon);
  const auto forward = single.Mutate(single.Train());
  const auto backward = single.Mutate(single.Backward(forward.context_id()));
  single.Mutate(single.Backward(single.Context()));
  const auto apply = single.Mutate(single.Apply());
  daemon.Ok(single.Release(single.Context()));
  single.Mutate(single.Zero());

  Calls calls(daemon);
  const auto send = [&](const v1::ExecuteRequest& item) {
    piped.session.Applied();
    return calls.Send(item);
  };
  const uint64_t f1 = send(Item(piped.Train()));
  const uint64_t b1 = send(Item(piped.Backward(""), f1));
  const uint64_t f2 = send(Item(piped.Train()));
  const uint64_t b2 = send(Item(piped.Backward(""), f2));
  const uint64_t a = send(Item(piped.Apply()));
  const uint64_t f3 = send(Item(piped.Train()));
  const uint64_t r3 = calls.Send(Item(piped.Release(""), f3));
  const uint64_t z = send(Item(piped.Zero()));
  const uint64_t e = calls.Send(Item(piped.Evaluate()));
  calls.NoMore();
  const v1::ForwardResponse first = calls.Ok(f1).forward();
  Require(Bytes(first.output()) == Bytes(forward.output()) && !first.context_id().empty(),
          "a Forward has another output than the single call's, or no context");
  Require(Bytes(calls.Ok(b1).backward().input_grad()) == Bytes(backward.input_grad()),
          "a Backward has another input_grad than the single call's");
  calls.Ok(f2);
  Require(calls.Ok(b2).has_backward(), "a Backward's answer has no backward");
  const v1::ApplyGradientsResponse applied = calls.Ok(a).apply_gradients();
  Require(applied.applied() && applied.step() == 1 && applied.grad_norm() == apply.grad_norm(),
          "ApplyGradients answers something else than the single call");
  calls.Ok(f3);
  Require(calls.Ok(r3).has_release_context(), "ReleaseContext's answer has no release_context");
  Require(calls.Ok(z).has_zero_gradients(), "ZeroGradients' answer has no zero_gradients");
  const v1::ForwardResponse last = calls.Ok(e).forward();
  Require(Bytes(last.output()) == Bytes(daemon.Ok(single.Evaluate()).output()),
          "the evaluation after the step has another output than the single call's");
  const grpc::Status end = calls.End();
  Require(end.ok(), "the stream ends with ", Describe(end));
  piped.RequireUnchanged(single.State(), "the pipelined calls, against the same single calls,");
}

// More than the daemon keeps waiting; a reader and a writer of its own, as gRPC asks.
void AnswersAllInOrder(Daemon& daemon) {
  const Rig rig(daemon);
  Calls calls(daemon);
  constexpr uint64_t kCalls = 200;
  const v1::ExecuteRequest item = Item(rig.Evaluate());
  std::thread writer([&] {
    for (uint64_t i = 1; i <= kCalls; ++i) calls.Send(item);
    calls.NoMore();
  });
  std::string broken;
  try {
    const std::string first = Bytes(calls.Ok(1).forward().output());
    for (uint64_t i = 2; i <= kCalls; ++i)
      Require(Bytes(calls.Ok(i).forward().output()) == first, "answer ", i, " has another output");
  } catch (const Violation& violation) {
    broken = violation.what;
    calls.Cancel();
  }
  writer.join();
  Require(broken.empty(), broken);
  const grpc::Status end = calls.End();
  Require(end.ok(), "the stream ends with ", Describe(end));
}

void IdsMustRise(Daemon& daemon) {
  Cases cases;
  for (const uint64_t id : {uint64_t{7}, uint64_t{6}}) {
    cases.Try(absl::StrCat(id, " after 7"), [&] {
      const Rig rig(daemon);
      Calls calls(daemon);
      calls.SendWithId(Item(rig.Evaluate()), 7);
      calls.Ok(7);
      calls.SendWithId(Item(rig.Evaluate()), id);
      Daemon::Refused("the stream", calls.End(), Code::INVALID_ARGUMENT, {"id"});
    });
  }
  cases.Try("any number that is above", [&] {
    const Rig rig(daemon);
    Calls calls(daemon);
    for (const uint64_t id : {uint64_t{3}, uint64_t{1000}, ~uint64_t{0}}) {
      calls.SendWithId(Item(rig.Evaluate()), id);
      calls.Ok(id);
    }
    calls.EndsWell();
  });
  cases.Done();
}

// What is wrong with an item is that item's answer: the stream goes on.
void ErrorsAreTheCalls(Daemon& daemon) {
  Rig rig(daemon);
  const std::string context = rig.Context();
  const StackState before = rig.State();
  Calls calls(daemon);
  Cases cases;
  const auto refuse = [&](const char* what, const v1::ExecuteRequest& item, Code code,
                          const char* word) {
    cases.Try(what, [&] {
      calls.Refuses(calls.Send(item), code, {word});
      calls.Ok(calls.Send(Item(rig.Evaluate())));
    });
  };
  constexpr Code kInvalid = Code::INVALID_ARGUMENT;
  refuse("no call", v1::ExecuteRequest(), kInvalid, "call");
  for (const double timeout : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN()}) {
    v1::ExecuteRequest item = Item(rig.Evaluate());
    item.set_timeout_seconds(timeout);
    refuse("a timeout that is no number above 0", item, kInvalid, "timeout_seconds");
  }
  const uint64_t forward = calls.Send(Item(rig.Evaluate()));
  calls.Ok(forward);
  v1::ExecuteRequest misplaced = Item(rig.Evaluate());
  misplaced.set_context_of(forward);
  refuse("context_of with a Forward", misplaced, kInvalid, "context_of");
  misplaced = Item(rig.Zero());
  misplaced.set_context_of(forward);
  refuse("context_of with ZeroGradients", misplaced, kInvalid, "context_of");
  misplaced = Item(rig.Apply());
  misplaced.set_context_of(forward);
  refuse("context_of with ApplyGradients", misplaced, kInvalid, "context_of");
  refuse("context_of and context_id", Item(rig.Backward(context), forward), kInvalid, "context_of");
  refuse("context_of of an evaluation", Item(rig.Backward(""), forward), Code::NOT_FOUND,
         "context_of");
  refuse("context_of of no call", Item(rig.Release(""), 987654321), Code::NOT_FOUND, "context_of");
  v1::ForwardRequest bad = rig.Evaluate();
  bad.mutable_input()->set_shape(2, 15);
  refuse("a bad Forward", Item(bad), kInvalid, "input");
  v1::BackwardRequest spent = rig.Backward("987654321");
  refuse("a context that is none", Item(spent), Code::NOT_FOUND, "context_id");
  refuse("a bad hyper-parameter", Item(rig.Apply(-1)), kInvalid, "learning_rate");
  v1::ZeroGradientsRequest gap = rig.Zero();
  gap.mutable_mutation()->set_sequence(99);
  refuse("a gap in the sequence", Item(gap), Code::FAILED_PRECONDITION, "mutation.sequence");
  cases.Done();
  rig.RequireUnchanged(before, "the refused calls");
  calls.EndsWell();
}

void FailureHoldsTheSequenceBack(Daemon& daemon) {
  Rig rig(daemon);
  const StackState before = rig.State();
  Calls calls(daemon);
  v1::ForwardRequest bad = rig.Train();
  bad.mutable_layers()->set_end(99);
  const uint64_t f = calls.Send(Item(bad));
  rig.session.Applied();  // as a client that does not wait for answers has to number
  const uint64_t b = calls.Send(Item(rig.Backward(""), f));
  rig.session.Applied();
  const uint64_t a = calls.Send(Item(rig.Apply()));
  const uint64_t e = calls.Send(Item(rig.Evaluate()));
  calls.Refuses(f, Code::INVALID_ARGUMENT, {"layers"});
  calls.Refuses(b, Code::FAILED_PRECONDITION, {"context_of"});
  calls.Refuses(a, Code::FAILED_PRECONDITION, {"mutation.sequence"});
  calls.Ok(e);
  rig.RequireUnchanged(before, "a failed call and those behind it");
  // From the failed one on, on the same stream.
  v1::ZeroGradientsRequest again = rig.Zero();
  again.mutable_mutation()->set_sequence(1);
  calls.Ok(calls.Send(Item(again)));
  calls.EndsWell();
}

void SpentContextsHaveNoName(Daemon& daemon) {
  Rig rig(daemon);
  Calls calls(daemon);
  const uint64_t f = calls.Send(Item(rig.Train()));
  rig.session.Applied();
  calls.Ok(f);
  calls.Ok(calls.Send(Item(rig.Backward(""), f)));
  rig.session.Applied();
  calls.Refuses(calls.Send(Item(rig.Backward(""), f)), Code::NOT_FOUND, {"context_of"});
  calls.Refuses(calls.Send(Item(rig.Release(""), f)), Code::NOT_FOUND, {"context_of"});
  calls.EndsWell();
  // A context that its stream leaves behind is its session's still.
  Calls first(daemon), second(daemon);
  const uint64_t g = first.Send(Item(rig.Train()));
  rig.session.Applied();
  const std::string context = first.Ok(g).forward().context_id();
  first.EndsWell();
  second.Refuses(second.Send(Item(rig.Backward(""), g)), Code::NOT_FOUND, {"context_of"});
  second.Ok(second.Send(Item(rig.Backward(context))));
  rig.session.Applied();
  second.EndsWell();
}

// A call that waits behind others for longer than its timeout.
void TimesOutAnItem(Daemon& daemon) {
  Rig rig(daemon);
  const StackState before = rig.State();
  const Busy busy(daemon);
  Calls calls(daemon);
  const int ahead = busy.CountFor(Milliseconds(200));
  for (int i = 0; i < ahead; ++i) calls.Send(Item(busy.Forward()));
  v1::ExecuteRequest late = Item(rig.Apply());
  late.set_timeout_seconds(0.02);
  const uint64_t timed = calls.Send(late);
  v1::ExecuteRequest patient = Item(rig.Evaluate());
  patient.set_timeout_seconds(60);
  const uint64_t after = calls.Send(patient);
  for (int i = 0; i < ahead; ++i) calls.Ok(static_cast<uint64_t>(i) + 1);
  calls.Refuses(timed, Code::DEADLINE_EXCEEDED);
  calls.Ok(after);
  rig.RequireUnchanged(before, "the call that timed out");
  calls.Ok(calls.Send(Item(rig.Zero())));  // its sequence is free
  calls.EndsWell();
}

void CancelsAnItem(Daemon& daemon) {
  Rig rig(daemon);
  const StackState before = rig.State();
  const Busy busy(daemon);
  Calls calls(daemon);
  const int ahead = busy.CountFor(Milliseconds(200));
  for (int i = 0; i < ahead; ++i) calls.Send(Item(busy.Forward()));
  const uint64_t cancelled = calls.Send(Item(rig.Apply()));
  const uint64_t released = calls.Send(Item(rig.Release("987654321")));
  const uint64_t kept = calls.Send(Item(rig.Evaluate()));
  calls.Send(CancelOf(cancelled));
  calls.Send(CancelOf(released));
  calls.Send(CancelOf(12345));  // no such call: nothing to do
  for (int i = 0; i < ahead; ++i) calls.Ok(static_cast<uint64_t>(i) + 1);
  calls.Refuses(cancelled, Code::CANCELLED);
  calls.Refuses(released, Code::CANCELLED);
  calls.Ok(kept);
  calls.Send(CancelOf(kept));  // it is answered: too late
  rig.RequireUnchanged(before, "the call that was cancelled");
  calls.Ok(calls.Send(Item(rig.Zero())));
  calls.EndsWell();
}

void CancelledStreamRunsNoMore(Daemon& daemon) {
  Rig rig(daemon);
  const StackState before = rig.State();
  Busy busy(daemon);
  {
    Calls calls(daemon);
    const int ahead = busy.CountFor(Milliseconds(300));
    for (int i = 0; i < ahead; ++i) calls.Send(Item(busy.Forward()));
    calls.Send(Item(rig.Zero()));
    calls.Send(Item(rig.Train()));
    calls.Ok(1);
    calls.Cancel();
    Daemon::Refused("a cancelled stream", calls.End(), Code::CANCELLED);
  }
  // Whatever had begun is over when this has run.
  busy.Start(Milliseconds(300));
  busy.Join();
  rig.RequireUnchanged(before, "a stream that was cancelled");
  rig.Mutate(rig.Apply());  // sequence 1 is free
}

void RunsWhatWaitsAtTheEnd(Daemon& daemon) {
  Rig rig(daemon);
  Calls calls(daemon);
  const uint64_t f = calls.Send(Item(rig.Train()));
  rig.session.Applied();
  const uint64_t b = calls.Send(Item(rig.Backward(""), f));
  rig.session.Applied();
  const uint64_t a = calls.Send(Item(rig.Apply()));
  rig.session.Applied();
  calls.NoMore();
  calls.Ok(f);
  calls.Ok(b);
  calls.Ok(a);
  const grpc::Status end = calls.End();
  Require(end.ok(), "the stream ends with ", Describe(end));
  Require(rig.stack.Describe().step() == 1, "the last call has not run");
}

void RepeatsOnAnotherStream(Daemon& daemon) {
  Rig rig(daemon);
  const v1::ForwardRequest train = rig.Train();
  std::string answer;
  {
    Calls calls(daemon);
    answer = Bytes(calls.Ok(calls.Send(Item(train))).forward());
    rig.session.Applied();
    calls.EndsWell();
  }
  Require(Bytes(daemon.Ok(train)) == answer,
          "a single call that repeats one of a stream answers other bytes");
  const v1::ZeroGradientsRequest zero = rig.Zero();
  rig.Mutate(zero);
  const v1::ApplyGradientsRequest apply = rig.Apply();
  answer = Bytes(rig.Mutate(apply));
  Calls calls(daemon);
  calls.Ok(calls.Send(Item(zero)));
  Require(Bytes(calls.Ok(calls.Send(Item(apply))).apply_gradients()) == answer,
          "a stream's call that repeats a single one answers other bytes");
  v1::ApplyGradientsRequest other = rig.Apply(0.5);
  *other.mutable_mutation() = apply.mutation();
  calls.Refuses(calls.Send(Item(other)), Code::ALREADY_EXISTS, {"mutation.sequence"});
  Require(rig.stack.Describe().step() == 1, "the repeats have made steps");
  calls.EndsWell();
}

}  // namespace

Group ExecuteChecks() {
  return {
      "execute",
      "Execute: calls on one stream",
      {
          {"execute.pipelined",
           "Calls that are sent before any answer is read do what single calls do, contexts named "
           "by context_of",
           PipelinesLikeSingleCalls},
          {"execute.order",
           "Each call is answered once, in the order of sending, however many wait",
           AnswersAllInOrder},
          {"execute.ids",
           "An id that is not above the one before ends the stream with INVALID_ARGUMENT",
           IdsMustRise},
          {"execute.errors", "Any other error is its call's own, and the stream goes on",
           ErrorsAreTheCalls},
          {"execute.failure",
           "After a mutation that failed, its context and those behind it in the sequence are "
           "FAILED_PRECONDITION",
           FailureHoldsTheSequenceBack},
          {"execute.context-of",
           "context_of names contexts of this stream's Forwards until they are spent",
           SpentContextsHaveNoName},
          {"execute.timeout",
           "A call that waits past its timeout_seconds is DEADLINE_EXCEEDED and has not run",
           TimesOutAnItem},
          {"execute.cancel", "`cancel` of a call that waits has it answer CANCELLED and not run",
           CancelsAnItem},
          {"execute.stream-cancelled",
           "When the stream is cancelled, calls that have not begun are not run",
           CancelledStreamRunsNoMore},
          {"execute.end",
           "After the client's last message, what waits is run and answered, and the stream ends "
           "with OK",
           RunsWhatWaitsAtTheEnd},
          {"execute.repeat", "A call can be repeated on another stream or by itself: it ran once",
           RepeatsOnAnotherStream},
      }};
}

}  // namespace lamina::conformance
