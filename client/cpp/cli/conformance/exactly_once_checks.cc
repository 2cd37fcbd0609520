// Exactly once: sequences, repeats, gaps, and the answers that are kept.
#include <thread>

#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

// The same request again is answered with the same bytes, and the stack is as after the first.
template <class Request>
void RepeatsTheAnswer(Rig& rig, const char* what, const Request& request) {
  const std::string first = Bytes(rig.Mutate(request));
  const StackState after = rig.State();
  for (int i = 0; i < 2; ++i) {
    Require(Bytes(rig.daemon.Ok(request)) == first, what,
            " repeated is answered with other bytes than at first");
  }
  rig.RequireUnchanged(after, absl::StrCat(what, " repeated"));
}

void AnswersRepeats(Daemon& daemon) {
  Rig rig(daemon);
  const v1::ForwardRequest train = rig.Train();
  RepeatsTheAnswer(rig, "Forward", train);
  const std::string context = daemon.Ok(train).context_id();
  RepeatsTheAnswer(rig, "Backward", rig.Backward(context));
  RepeatsTheAnswer(rig, "ApplyGradients", rig.Apply());
  RepeatsTheAnswer(rig, "SetParameters", rig.Set("layers.0.inter_b", Inline({24}, Values(24, 3))));
  RepeatsTheAnswer(rig, "ZeroGradients", rig.Zero());
}

void AccumulatesOnce(Daemon& daemon) {
  Rig rig(daemon);
  const v1::BackwardRequest backward = rig.Backward(rig.Context());
  rig.Mutate(backward);
  const StackState once = rig.State();
  daemon.Ok(backward);
  rig.RequireUnchanged(once, "a Backward that was repeated");
  rig.Mutate(rig.Backward(rig.Context()));
  Require(rig.State().gradients != once.gradients, "a second Backward has added nothing");
}

void StepsOnce(Daemon& daemon) {
  Rig rig(daemon);
  rig.Mutate(rig.Backward(rig.Context()));
  const v1::ApplyGradientsRequest apply = rig.Apply();
  Require(rig.Mutate(apply).step() == 1, "the first ApplyGradients is not step 1");
  const StackState once = rig.State();
  Require(daemon.Ok(apply).step() == 1, "the repeat answers another step than the first did");
  rig.RequireUnchanged(once, "an ApplyGradients that was repeated");
  Require(rig.Mutate(rig.Apply()).step() == 2, "the second ApplyGradients is not step 2");
}

// Repeats that come while the first still runs.
void RunsOnceAtATime(Daemon& daemon) {
  Rig rig(daemon);
  rig.Mutate(rig.Backward(rig.Context()));
  const v1::ApplyGradientsRequest apply = rig.Apply();
  constexpr size_t kSenders = 4;
  std::vector<Answer<v1::ApplyGradientsResponse>> answers(kSenders);
  {
    std::vector<std::thread> senders;
    for (size_t i = 0; i < kSenders; ++i) {
      senders.emplace_back([&, i] {
        grpc::ClientContext context;
        daemon.Prepare(&context);
        answers[i].status = daemon.layers().ApplyGradients(&context, apply, &answers[i].response);
      });
    }
    for (std::thread& sender : senders) sender.join();
  }
  rig.session.Applied();
  for (const auto& answer : answers) {
    Require(answer.status.ok(), "one of several at once answers ", Describe(answer.status));
    Require(Bytes(answer.response) == Bytes(answers[0].response),
            "several at once are answered with different bytes");
  }
  Require(rig.stack.Describe().step() == 1, "several at once have made ",
          rig.stack.Describe().step(), " steps");
}

void RefusesAnotherBody(Daemon& daemon) {
  Rig rig(daemon);
  const v1::ForwardRequest train = rig.Train();
  const std::string context = rig.Mutate(train).context_id();
  const v1::BackwardRequest backward = rig.Backward(context);
  rig.Mutate(backward);
  const v1::ApplyGradientsRequest apply = rig.Apply(0.01);
  rig.Mutate(apply);
  const auto set = rig.Set("layers.0.inter_b", Inline({24}, Values(24, 3)));
  rig.Mutate(set);
  const StackState before = rig.State();
  Cases cases;
  const auto refuse = [&](const char* what, auto request, const v1::Mutation& used) {
    cases.Try(what, [&] {
      *request.mutable_mutation() = used;
      daemon.Refuses(request, Code::ALREADY_EXISTS, {"mutation.sequence"});
      rig.RequireUnchanged(before, "the refused call");
    });
  };
  v1::ForwardRequest other_forward = train;
  other_forward.mutable_layers()->set_end(1);
  refuse("Forward with another range", other_forward, train.mutation());
  v1::BackwardRequest other_backward = backward;
  other_backward.clear_input_grad();
  refuse("Backward with another target", other_backward, backward.mutation());
  refuse("ApplyGradients with another learning_rate", rig.Apply(0.02), apply.mutation());
  refuse("SetParameters with other values",
         rig.Set("layers.0.inter_b", Inline({24}, Values(24, 4))), set.mutation());
  refuse("ZeroGradients where another method's call was", rig.Zero(), apply.mutation());
  cases.Done();
  rig.Mutate(rig.Zero());  // the session goes on where it was
}

void RefusesGaps(Daemon& daemon) {
  Rig rig(daemon);
  const StackState before = rig.State();
  Cases cases;
  const auto refuse = [&](const char* what, auto request) {
    cases.Try(what, [&] {
      for (const uint64_t gap : {uint64_t{2}, uint64_t{1000}, ~uint64_t{0}}) {
        request.mutable_mutation()->set_sequence(gap);
        daemon.Refuses(request, Code::FAILED_PRECONDITION, {"mutation.sequence"});
        rig.RequireUnchanged(before, "the refused call");
      }
    });
  };
  refuse("Forward", rig.Train());
  refuse("Backward", rig.Backward("1"));
  refuse("ApplyGradients", rig.Apply());
  refuse("ZeroGradients", rig.Zero());
  refuse("SetParameters", rig.Set("layers.0.inter_b", Inline({24}, Values(24, 3))));
  cases.Done();
  rig.Mutate(rig.Zero());
}

void FailuresUseNoSequence(Daemon& daemon) {
  Rig rig(daemon);
  const uint64_t sequence = rig.session.sequence();
  daemon.Refuses(rig.Apply(-1), Code::INVALID_ARGUMENT);
  auto elsewhere = rig.Zero();
  elsewhere.set_stack("no-such-stack");
  daemon.Refuses(elsewhere, Code::NOT_FOUND);
  auto next = rig.Zero();
  next.mutable_mutation()->set_sequence(sequence + 1);
  daemon.Refuses(next, Code::FAILED_PRECONDITION);
  // The same sequence with any body, for nothing was kept of those that failed.
  Require(rig.Mutate(rig.Apply(0.01)).step() == 1, "the sequence of a failed call can't be used");
}

void KeepsTheLastAnswers(Daemon& daemon) {
  Rig rig(daemon);
  const int window = daemon.info().replay_window();
  if (window > 4096) Skip("the replay window is ", window, " answers");
  std::vector<v1::ZeroGradientsRequest> sent;
  for (int i = 0; i < window + 1; ++i) {
    sent.push_back(rig.Zero());
    rig.Mutate(sent.back());
  }
  for (int i = 1; i <= window; ++i) daemon.Ok(sent[static_cast<size_t>(i)]);
  daemon.Refuses(sent[0], Code::ALREADY_EXISTS, {"mutation.sequence"});
  rig.Mutate(rig.Zero());
}

void SequencesAreASessions(Daemon& daemon) {
  Rig rig(daemon);
  rig.Mutate(rig.Zero());
  rig.Mutate(rig.Zero());
  OwnSession other(daemon);
  auto theirs = rig.Zero();
  *theirs.mutable_mutation() = other.Next();
  daemon.Ok(theirs);  // 1 again: another body than the first session's, and no repeat of it
  rig.Mutate(rig.Zero());
}

void AnswersAfterTheStackIsGone(Daemon& daemon) {
  Rig rig(daemon);
  const v1::ForwardRequest train = rig.Train();
  const std::string first = Bytes(rig.Mutate(train));
  v1::DeleteStackRequest end;
  end.set_name(rig.stack.name());
  daemon.Ok(end);
  Require(Bytes(daemon.Ok(train)) == first,
          "a repeat after DeleteStack is answered with other bytes than at first");
}

void EvaluationsTakeNoSequence(Daemon& daemon) {
  Rig rig(daemon);
  for (int i = 0; i < 3; ++i) daemon.Ok(rig.Evaluate());
  Require(rig.session.sequence() == 1, "no mutation was sent");
  rig.Mutate(rig.Zero());
}

}  // namespace

Group ExactlyOnceChecks() {
  return {
      "once",
      "Exactly once: each mutation of a session runs once, in its sequence",
      {
          {"once.repeat",
           "A repeated mutation is answered with the first answer's bytes and does not run again",
           AnswersRepeats},
          {"once.backward", "A repeated Backward accumulates once", AccumulatesOnce},
          {"once.apply", "A repeated ApplyGradients makes one step", StepsOnce},
          {"once.at-once", "Repeats that arrive while the first runs are answered as it is",
           RunsOnceAtATime},
          {"once.other-body", "A sequence that was used with another body is ALREADY_EXISTS",
           RefusesAnotherBody},
          {"once.gap", "A sequence beyond the next one is FAILED_PRECONDITION", RefusesGaps},
          {"once.failed", "A call that fails does not use its sequence up", FailuresUseNoSequence},
          {"once.window",
           "The last replay_window answers are kept; before them it is ALREADY_EXISTS",
           KeepsTheLastAnswers},
          {"once.per-session", "Each session counts from 1, whatever others do",
           SequencesAreASessions},
          {"once.stack-gone", "A repeat is answered as at first though its stack is gone",
           AnswersAfterTheStackIsGone},
          {"once.evaluation", "Evaluations take no sequence", EvaluationsTakeNoSequence},
      }};
}

}  // namespace lamina::conformance
