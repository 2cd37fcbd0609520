// Checkpoints: a stack's state written to the daemon's folder and read back.
#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

v1::SaveCheckpointRequest Save(const std::string& stack, const std::string& name = "") {
  v1::SaveCheckpointRequest request;
  request.set_stack(stack);
  request.set_name(name);
  return request;
}

v1::LoadCheckpointRequest Load(const std::string& stack, const std::string& name,
                               bool create = false) {
  v1::LoadCheckpointRequest request;
  request.set_stack(stack);
  request.set_name(name);
  request.set_create(create);
  return request;
}

// A checkpoint under a name that nobody else has. No call of the contract deletes one: the
// destructor does where the daemon's folder is this host's.
class OwnCheckpoint {
 public:
  OwnCheckpoint(Daemon& daemon, const std::string& stack)
      : name_(daemon.NewName()), saved_(daemon.Ok(Save(stack, name_))) {}
  ~OwnCheckpoint() { unlink(saved_.path().c_str()); }
  OwnCheckpoint(const OwnCheckpoint&) = delete;
  OwnCheckpoint& operator=(const OwnCheckpoint&) = delete;
  const std::string& name() const { return name_; }
  const v1::SaveCheckpointResponse& saved() const { return saved_; }
  bool here() const { return access(saved_.path().c_str(), W_OK) == 0; }

 private:
  const std::string name_;
  const v1::SaveCheckpointResponse saved_;
};

v1::StackConfig WithDropout() {
  v1::StackConfig config = SmallConfig();
  config.set_hidden_dropout_ratio(0.1);
  config.set_attn_dropout_ratio(0.1);
  return config;
}

void TrainSteps(Rig& rig, int steps) {
  for (int i = 0; i < steps; ++i) {
    rig.Mutate(rig.Backward(rig.Context()));
    auto apply = rig.Apply();
    apply.set_zero_gradients(true);
    rig.Mutate(apply);
  }
}

void GoesOnBitForBit(Daemon& daemon) {
  daemon.NeedCheckpoints();
  Rig rig(daemon, WithDropout());
  TrainSteps(rig, 2);
  rig.Mutate(rig.Backward(rig.Context()));  // gradients are kept too
  const StackState saved = rig.State();
  const OwnCheckpoint checkpoint(daemon, rig.stack.name());
  Require(checkpoint.saved().step() == 2, "the answer's step is ", checkpoint.saved().step());
  Require(checkpoint.saved().size_bytes() > 0, "the answer's size_bytes is 0");
  TrainSteps(rig, 2);
  const StackState went_on = rig.State();
  Require(went_on.parameters != saved.parameters, "two steps have changed no parameter");
  daemon.Ok(Load(rig.stack.name(), checkpoint.name()));
  rig.RequireUnchanged(saved, "loading the checkpoint");
  TrainSteps(rig, 2);
  rig.RequireUnchanged(went_on, "training on from the checkpoint as before");
}

void CreatesTheSavedStack(Daemon& daemon) {
  daemon.NeedCheckpoints();
  Rig rig(daemon, WithDropout());
  TrainSteps(rig, 1);
  const OwnCheckpoint checkpoint(daemon, rig.stack.name());
  daemon.Refuses(Load(rig.stack.name(), checkpoint.name(), true), Code::ALREADY_EXISTS,
                 {rig.stack.name()});
  const std::string name = daemon.NewName();
  daemon.Refuses(Load(name, checkpoint.name()), Code::NOT_FOUND, {name});
  const v1::Stack made = daemon.Ok(Load(name, checkpoint.name(), true)).stack();
  v1::GetParametersRequest parameters;
  parameters.set_stack(name);
  const auto answer = daemon.Call(parameters);
  v1::DeleteStackRequest end;
  end.set_name(name);
  daemon.Ok(end);
  Require(Bytes(made.config()) == Bytes(rig.stack.Describe().config()),
          "the new stack has another config");
  Require(made.name() == name && made.step() == 1 && made.forward_count() == 1,
          "the new stack has other counters");
  Require(Bytes(answer.response) == Bytes(daemon.Ok(rig.Parameters())),
          "the new stack has other parameters");
}

void RefusesOtherShapes(Daemon& daemon) {
  daemon.NeedCheckpoints();
  const Rig rig(daemon);
  const OwnCheckpoint checkpoint(daemon, rig.stack.name());
  v1::StackConfig wider = SmallConfig(), deeper = SmallConfig();
  wider.set_intermediate_size(32);
  deeper.set_num_hidden_layers(3);
  for (const auto& [config, word] : {std::pair(wider, "inter_w"), std::pair(deeper, "layers")}) {
    const Rig other(daemon, config);
    const StackState before = other.State();
    daemon.Refuses(Load(other.stack.name(), checkpoint.name()), Code::INVALID_ARGUMENT, {word});
    other.RequireUnchanged(before, "the refused load");
  }
}

void RefusesBadNames(Daemon& daemon) {
  daemon.NeedCheckpoints();
  const Rig rig(daemon);
  Cases cases;
  for (const char* name : {"../escape", "/etc/passwd", ".hidden", "a b"}) {
    cases.Try(name, [&] {
      daemon.Refuses(Save(rig.stack.name(), name), Code::INVALID_ARGUMENT, {"name"});
      daemon.Refuses(Load(rig.stack.name(), name), Code::INVALID_ARGUMENT, {"name"});
    });
  }
  cases.Done();
  const std::string absent = daemon.NewName();
  daemon.Refuses(Save(absent), Code::NOT_FOUND, {absent});
  daemon.Refuses(Load(rig.stack.name(), absent), Code::NOT_FOUND, {absent});
}

void SeesDamage(Daemon& daemon) {
  daemon.NeedCheckpoints();
  const Rig rig(daemon);
  const OwnCheckpoint checkpoint(daemon, rig.stack.name());
  if (!checkpoint.here()) Skip("the daemon's checkpoint folder is not to be reached from here");
  const std::string& path = checkpoint.saved().path();
  const auto bytes = static_cast<std::streamoff>(checkpoint.saved().size_bytes());
  const StackState before = rig.State();
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(bytes - 5);
    const char flipped = static_cast<char>(file.peek() ^ 0x10);
    file.seekp(bytes - 5);
    file.put(flipped);
  }
  daemon.Refuses(Load(rig.stack.name(), checkpoint.name()), Code::DATA_LOSS);
  rig.RequireUnchanged(before, "loading a file with a flipped bit");
  Require(truncate(path.c_str(), bytes - 100) == 0, "the file can't be cut off");
  daemon.Refuses(Load(rig.stack.name(), checkpoint.name()), Code::DATA_LOSS);
  rig.RequireUnchanged(before, "loading a file that was cut off");
}

}  // namespace

Group CheckpointChecks() {
  return {"checkpoints",
          "Checkpoints (a file of each check's own; removed where the folder is this host's)",
          {
              {"checkpoints.round-trip",
               "A stack that was saved and loaded goes on bit for bit: weights, moments, "
               "gradients, counters, dropout",
               GoesOnBitForBit},
              {"checkpoints.create",
               "LoadCheckpoint with create makes the saved stack; of a stack that is there it is "
               "ALREADY_EXISTS",
               CreatesTheSavedStack},
              {"checkpoints.fit",
               "A file whose tensors do not fit the stack is INVALID_ARGUMENT, says which, and "
               "changes nothing",
               RefusesOtherShapes},
              {"checkpoints.names",
               "A bad name is INVALID_ARGUMENT, a stack or file that is not there NOT_FOUND",
               RefusesBadNames},
              {"checkpoints.damage", "A damaged file is DATA_LOSS and changes nothing", SeesDamage},
              {"checkpoints.no-folder",
               "Without a checkpoint folder both calls are FAILED_PRECONDITION",
               [](Daemon& daemon) {
                 if (daemon.info().checkpoints_enabled())
                   Skip("the daemon has a checkpoint folder");
                 const Rig rig(daemon);
                 daemon.Refuses(Save(rig.stack.name()), Code::FAILED_PRECONDITION, {"folder"});
                 daemon.Refuses(Load(rig.stack.name(), ""), Code::FAILED_PRECONDITION, {"folder"});
               }},
          }};
}

}  // namespace lamina::conformance
