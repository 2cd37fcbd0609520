// Stacks and plans: ConfigService without parameters and checkpoints.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "cli/conformance/checks.h"
#include "cli/conformance/rig.h"

namespace lamina::conformance {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

v1::CreateStackRequest Create(const std::string& name, const v1::StackConfig& config) {
  v1::CreateStackRequest request;
  request.set_name(name);
  *request.mutable_config() = config;
  return request;
}

v1::GetStackRequest Get(const std::string& name) {
  v1::GetStackRequest request;
  request.set_name(name);
  return request;
}

v1::DeleteStackRequest Delete(const std::string& name) {
  v1::DeleteStackRequest request;
  request.set_name(name);
  return request;
}

v1::UpdateStackRequest Update(const std::string& name) {
  v1::UpdateStackRequest request;
  request.set_name(name);
  return request;
}

v1::PlanMemoryRequest Plan(const v1::StackConfig& config) {
  v1::PlanMemoryRequest request;
  *request.mutable_config() = config;
  return request;
}

// A field of a config, and a value that is outside its range.
struct BadField {
  const char* field;
  const char* value;  // as its message has it; empty: it need not
  void (*set)(v1::StackConfig*);
};

using C = v1::StackConfig*;
const BadField kBadFields[] = {
    {"batch_size", "0", [](C c) { c->set_batch_size(0); }},
    {"batch_size", "65537", [](C c) { c->set_batch_size(65537); }},
    {"max_seq_length", "-1", [](C c) { c->set_max_seq_length(-1); }},
    {"max_seq_length", "8193", [](C c) { c->set_max_seq_length(8193); }},
    {"hidden_size", "0", [](C c) { c->set_hidden_size(0); }},
    {"hidden_size", "17", [](C c) { c->set_hidden_size(17); }},  // not divisible by heads
    {"intermediate_size", "0", [](C c) { c->set_intermediate_size(0); }},
    {"intermediate_size", "-2", [](C c) { c->set_intermediate_size(-2); }},
    {"heads", "0", [](C c) { c->set_heads(0); }},
    {"heads", "17", [](C c) { c->set_heads(17); }},
    {"attn_dropout_ratio", "1", [](C c) { c->set_attn_dropout_ratio(1); }},
    {"attn_dropout_ratio", "", [](C c) { c->set_attn_dropout_ratio(kNaN); }},
    {"hidden_dropout_ratio", "-0.1", [](C c) { c->set_hidden_dropout_ratio(-0.1); }},
    {"num_hidden_layers", "0", [](C c) { c->set_num_hidden_layers(0); }},
    {"initializer_range", "-1", [](C c) { c->set_initializer_range(-1); }},
    {"layer_norm_eps", "0", [](C c) { c->set_layer_norm_eps(0); }},
    {"local_rank", "77", [](C c) { c->set_local_rank(77); }},
    {"seed", "-2", [](C c) { c->set_seed(-2); }},
    {"dtype", "", [](C c) { c->set_dtype(v1::DATA_TYPE_INT32); }},
    {"dtype", "99", [](C c) { c->set_dtype(static_cast<v1::DataType>(99)); }},
    {"fp16", "",
     [](C c) {
       c->set_fp16(true);
       c->set_dtype(v1::DATA_TYPE_BFLOAT16);
     }},
    {"gelu", "9", [](C c) { c->set_gelu(static_cast<v1::Gelu>(9)); }},
    {"max_contexts", "0", [](C c) { c->set_max_contexts(0); }},
    {"max_contexts", "1025", [](C c) { c->set_max_contexts(1025); }},
    {"initial_loss_scale", "0", [](C c) { c->set_initial_loss_scale(0); }},
    {"loss_scale_growth_interval", "0", [](C c) { c->set_loss_scale_growth_interval(0); }},
    {"loss_scale_growth_factor", "1", [](C c) { c->set_loss_scale_growth_factor(1); }},
    {"loss_scale_backoff_factor", "1", [](C c) { c->set_loss_scale_backoff_factor(1); }},
    {"loss_scale_hysteresis", "0", [](C c) { c->set_loss_scale_hysteresis(0); }},
    {"min_loss_scale", "0", [](C c) { c->set_min_loss_scale(0); }},
};

// `request` of a config with each bad field in turn is refused, with the field in the message.
template <class MakeRequest>
void RefusesEachBadField(Daemon& daemon, MakeRequest request) {
  Cases cases;
  for (const BadField& bad : kBadFields) {
    cases.Try(absl::StrCat(bad.field, " ", bad.value), [&] {
      v1::StackConfig config = SmallConfig();
      bad.set(&config);
      daemon.Refuses(request(config), Code::INVALID_ARGUMENT, {bad.field, bad.value});
    });
  }
  cases.Done();
}

// A config whose plan this device can't hold.
v1::StackConfig TooBig(Daemon& daemon) {
  v1::StackConfig config;
  config.set_batch_size(64);
  config.set_max_seq_length(512);
  config.set_hidden_size(4096);
  config.set_heads(32);
  for (int64_t layers = 64; layers <= 1024; layers *= 2) {
    config.set_num_hidden_layers(layers);
    if (!daemon.Ok(Plan(config)).fits()) return config;
  }
  Skip("the device holds whatever plan was tried");
}

void FillsDefaultsIn(Daemon& daemon) {
  v1::StackConfig config;
  config.set_batch_size(2);
  config.set_max_seq_length(4);
  config.set_hidden_size(8);
  config.set_heads(2);
  config.set_num_hidden_layers(1);
  const OwnStack stack(daemon, config);
  const v1::StackConfig& filled = stack.config();
  Require(filled.intermediate_size() == 32, "intermediate_size is ", filled.intermediate_size(),
          "; 4 * hidden_size is 32");
  Require(filled.initializer_range() == 0.02, "initializer_range is ", filled.initializer_range());
  Require(filled.layer_norm_eps() == 1e-12, "layer_norm_eps is ", filled.layer_norm_eps());
  Require(filled.has_seed() && filled.seed() >= 0, "seed is ", filled.seed());
  Require(filled.pre_layer_norm() && filled.adjust_init_range() && filled.training(),
          "pre_layer_norm, adjust_init_range or training is not true");
  Require(filled.dtype() == v1::DATA_TYPE_FLOAT32, "dtype is not FLOAT32");
  Require(filled.gelu() == v1::GELU_ERF, "gelu is not GELU_ERF");
  Require(filled.max_contexts() == 2, "max_contexts is ", filled.max_contexts());
  Require(filled.initial_loss_scale() == 65536 && filled.min_loss_scale() == 1 &&
              filled.loss_scale_growth_interval() == 1000 &&
              filled.loss_scale_growth_factor() == 2 && filled.loss_scale_backoff_factor() == 0.5 &&
              filled.loss_scale_hysteresis() == 2,
          "a setting of the loss scale has another default");
  const v1::Stack described = stack.Describe();
  Require(described.step() == 0 && described.skipped_steps() == 0 &&
              described.forward_count() == 0 && described.outstanding_contexts() == 0,
          "a new stack has counted something");
  Require(described.loss_scale() == 1, "loss_scale is ", described.loss_scale(),
          " without dynamic_loss_scale");
}

void ListsItsParameters(Daemon& daemon) {
  const OwnStack stack(daemon, SmallConfig());
  const auto answer = daemon.Ok(Get(stack.name()));
  const int64_t h = 16, i = 24;
  const std::pair<const char*, std::vector<int64_t>> kinds[] = {
      {"attn_qkvw", {3 * h, h}}, {"attn_qkvb", {3 * h}}, {"attn_ow", {h, h}}, {"attn_ob", {h}},
      {"attn_nw", {h}},          {"attn_nb", {h}},       {"inter_w", {i, h}}, {"inter_b", {i}},
      {"output_w", {h, i}},      {"output_b", {h}},      {"norm_w", {h}},     {"norm_b", {h}}};
  int64_t values = 0;
  std::set<std::string> names;
  for (const auto& parameter : answer.parameters()) names.insert(parameter.name());
  for (int layer = 0; layer < 2; ++layer) {
    for (const auto& [kind, shape] : kinds) {
      const std::string name = absl::StrCat("layers.", layer, ".", kind);
      const auto found = std::find_if(answer.parameters().begin(), answer.parameters().end(),
                                      [&](const auto& p) { return p.name() == name; });
      Require(found != answer.parameters().end(), "there is no ", name);
      Require(std::equal(found->shape().begin(), found->shape().end(), shape.begin(), shape.end()),
              name, " has another shape than [out, in] or [out] of H 16, I 24");
      values += Elements(shape);
    }
  }
  Require(names.size() == 24, "there are ", names.size(), " parameters; two layers have 24");
  Require(answer.stack().parameter_count() == values, "parameter_count is ",
          answer.stack().parameter_count(), "; the shapes have ", values, " values");
}

void PlansToTheByte(Daemon& daemon) {
  const auto planned = daemon.Ok(Plan(SmallConfig()));
  const OwnStack stack(daemon, SmallConfig());
  const v1::MemoryPlan allocated = stack.Describe().plan();
  Require(Bytes(planned.plan()) == Bytes(allocated),
          "the stack's plan is another than PlanMemory's of its config");
  uint64_t sum = 0;
  for (const auto& entry : allocated.entries()) sum += entry.size_bytes();
  Require(sum == allocated.total_bytes(), "total_bytes is ", allocated.total_bytes(),
          "; the entries have ", sum);
  Require(allocated.context_bytes() > 0 && allocated.context_bytes() < allocated.total_bytes(),
          "context_bytes is ", allocated.context_bytes());
  Require(planned.fits(), "fits is false of a stack that could be created");
}

void RefusesWhatDoesNotFit(Daemon& daemon) {
  const v1::StackConfig config = TooBig(daemon);
  const std::string name = daemon.NewName();
  const auto answer = daemon.Call(Create(name, config));
  Daemon::Refused("CreateStack", answer.status, Code::RESOURCE_EXHAUSTED, {"bytes", "free"});
  daemon.Refuses(Get(name), Code::NOT_FOUND);
  // Nothing was lost on the way.
  const OwnStack small(daemon, SmallConfig());
}

void DeletesContextsToo(Daemon& daemon) {
  Rig rig(daemon);
  const std::string context = rig.Context();
  daemon.Ok(Delete(rig.stack.name()));
  daemon.Refuses(rig.Backward(context), Code::FAILED_PRECONDITION, {"deleted"});
  daemon.Refuses(rig.Release(context), Code::FAILED_PRECONDITION, {"deleted"});
  daemon.Refuses(rig.Train(), Code::NOT_FOUND, {rig.stack.name()});
  daemon.Refuses(rig.Evaluate(), Code::NOT_FOUND, {rig.stack.name()});
  daemon.Refuses(Get(rig.stack.name()), Code::NOT_FOUND, {rig.stack.name()});
}

// Training off takes little, and on more than the device has.
void RefusesUpdatesThatDoNotFit(Daemon& daemon) {
  v1::StackConfig config;
  config.set_batch_size(64);
  config.set_max_seq_length(512);
  config.set_hidden_size(64);
  config.set_heads(1);
  config.set_max_contexts(1024);
  int64_t layers = 1;
  const auto fits = [&](bool training) {
    config.set_num_hidden_layers(layers);
    config.set_training(training);
    return daemon.Ok(Plan(config)).fits();
  };
  while (fits(true) && layers < 64) layers *= 2;
  if (fits(true) || !fits(false)) Skip("no plan was found that fits with training off alone");
  const OwnStack stack(daemon, config);
  const std::string before = Bytes(stack.Describe());
  v1::UpdateStackRequest update = Update(stack.name());
  update.set_training(true);
  daemon.Refuses(update, Code::RESOURCE_EXHAUSTED, {"bytes", "free"});
  Require(Bytes(stack.Describe()) == before, "the refused update has changed the stack");
}

void UpdatesWhatCanChange(Daemon& daemon) {
  const OwnStack stack(daemon, SmallConfig());
  v1::UpdateStackRequest update = Update(stack.name());
  update.set_attn_dropout_ratio(0.25);
  update.set_hidden_dropout_ratio(0.5);
  update.set_gelu_checkpoint(true);
  update.set_activation_checkpointing(true);
  update.set_stochastic_mode(true);
  const v1::StackConfig now = daemon.Ok(update).stack().config();
  Require(now.attn_dropout_ratio() == 0.25 && now.hidden_dropout_ratio() == 0.5 &&
              now.gelu_checkpoint() && now.activation_checkpointing() && now.stochastic_mode(),
          "the answer has not all of the changes");
  Require(!now.normalize_invertible() && !now.attn_dropout_checkpoint() && now.training(),
          "a field that was absent has changed");
  Require(Bytes(stack.Describe().config()) == Bytes(now), "GetStack tells another config");
  update = Update(stack.name());
  update.set_training(false);
  Require(!daemon.Ok(update).stack().config().training(), "training is still on");
  const auto plan = stack.Describe().plan();
  for (const auto& entry : plan.entries()) {
    Require(entry.kind() != v1::MEMORY_KIND_GRADIENTS || entry.size_bytes() == 0,
            "gradients are kept with training off");
  }
}

void UpdatesAllOrNone(Daemon& daemon) {
  const OwnStack stack(daemon, SmallConfig());
  const std::string before = Bytes(stack.Describe());
  Cases cases;
  for (const double ratio : {1.0, -0.5, kNaN}) {
    for (const bool attention : {true, false}) {
      cases.Try(absl::StrCat(attention ? "attn" : "hidden", "_dropout_ratio ", ratio), [&] {
        v1::UpdateStackRequest update = Update(stack.name());
        update.set_gelu_checkpoint(true);
        if (attention) {
          update.set_attn_dropout_ratio(ratio);
        } else {
          update.set_hidden_dropout_ratio(ratio);
        }
        daemon.Refuses(update, Code::INVALID_ARGUMENT,
                       {attention ? "attn_dropout_ratio" : "hidden_dropout_ratio"});
        Require(Bytes(stack.Describe()) == before, "the refused update has changed the stack");
      });
    }
  }
  cases.Done();
}

void KeepsContextsMemory(Daemon& daemon) {
  Rig rig(daemon);
  const std::string context = rig.Context();
  v1::UpdateStackRequest off = Update(rig.stack.name());
  off.set_training(false);
  v1::UpdateStackRequest flag = Update(rig.stack.name());
  flag.set_gelu_checkpoint(true);
  const std::string before = Bytes(rig.stack.Describe());
  daemon.Refuses(off, Code::FAILED_PRECONDITION, {"outstanding"});
  daemon.Refuses(flag, Code::FAILED_PRECONDITION, {"outstanding"});
  Require(Bytes(rig.stack.Describe()) == before, "a refused update has changed the stack");
  // What lays no memory out anew may change.
  v1::UpdateStackRequest ratio = Update(rig.stack.name());
  ratio.set_hidden_dropout_ratio(0.1);
  daemon.Ok(ratio);
  daemon.Ok(rig.Release(context));
  daemon.Ok(flag);
}

}  // namespace

Group StackChecks() {
  return {"stacks",
          "Stacks and their plans",
          {
              {"stacks.create-defaults",
               "CreateStack answers with the config, every default filled in", FillsDefaultsIn},
              {"stacks.create-name",
               "A name is 1 to 64 of letters, digits, '.', '_' and '-', not beginning with '.'",
               [](Daemon& daemon) {
                 Cases cases;
                 for (const std::string& name :
                      {std::string(), std::string(65, 'a'), std::string(".a"), std::string("a/b"),
                       std::string("a b"), std::string("\xc3\xa9"), std::string("a\nb")}) {
                   cases.Try(absl::StrCat("a name of ", name.size(), " bytes"), [&] {
                     daemon.Refuses(Create(name, SmallConfig()), Code::INVALID_ARGUMENT, {"name"});
                   });
                 }
                 cases.Done();
               }},
              {"stacks.create-fields",
               "CreateStack of a field outside its range is INVALID_ARGUMENT and names the field",
               [](Daemon& daemon) {
                 const std::string name = daemon.NewName();
                 RefusesEachBadField(
                     daemon, [&](const v1::StackConfig& config) { return Create(name, config); });
                 daemon.Refuses(Get(name), Code::NOT_FOUND);
               }},
              {"stacks.create-exists", "CreateStack of a name that is taken is ALREADY_EXISTS",
               [](Daemon& daemon) {
                 const OwnStack stack(daemon, SmallConfig());
                 const std::string before = Bytes(stack.Describe());
                 v1::StackConfig other = SmallConfig();
                 other.set_num_hidden_layers(1);
                 daemon.Refuses(Create(stack.name(), other), Code::ALREADY_EXISTS, {stack.name()});
                 Require(Bytes(stack.Describe()) == before, "the stack that was there has changed");
               }},
              {"stacks.create-too-big",
               "CreateStack of a plan that does not fit is RESOURCE_EXHAUSTED with the bytes "
               "needed and free",
               RefusesWhatDoesNotFit},
              {"stacks.get-parameters",
               "GetStack lists twelve parameters a layer with their shapes", ListsItsParameters},
              {"stacks.not-found", "Calls on a stack that is not there are NOT_FOUND and name it",
               [](Daemon& daemon) {
                 const std::string name = daemon.NewName();
                 daemon.Refuses(Get(name), Code::NOT_FOUND, {name});
                 daemon.Refuses(Delete(name), Code::NOT_FOUND, {name});
                 v1::UpdateStackRequest update = Update(name);
                 update.set_training(false);
                 daemon.Refuses(update, Code::NOT_FOUND, {name});
               }},
              {"stacks.list", "ListStacks has all stacks, by name",
               [](Daemon& daemon) {
                 const OwnStack a(daemon, SmallConfig()), b(daemon, SmallConfig());
                 std::vector<std::string> names;
                 const auto listed = daemon.Ok(v1::ListStacksRequest());
                 for (const auto& stack : listed.stacks()) names.push_back(stack.name());
                 Require(std::is_sorted(names.begin(), names.end()), "the names are not in order");
                 for (const OwnStack* stack : {&a, &b}) {
                   Require(std::count(names.begin(), names.end(), stack->name()) == 1,
                           "a stack that was created is not in the list once");
                 }
               }},
              {"stacks.update", "UpdateStack changes the fields that are given and no others",
               UpdatesWhatCanChange},
              {"stacks.update-range",
               "UpdateStack with a ratio outside [0, 1) is INVALID_ARGUMENT and changes nothing",
               UpdatesAllOrNone},
              {"stacks.update-nothing", "UpdateStack with nothing to change is INVALID_ARGUMENT",
               [](Daemon& daemon) {
                 const OwnStack stack(daemon, SmallConfig());
                 daemon.Refuses(Update(stack.name()), Code::INVALID_ARGUMENT,
                                {"nothing to change"});
               }},
              {"stacks.update-contexts",
               "While contexts are outstanding, training can't go off and memory flags can't "
               "change: FAILED_PRECONDITION",
               KeepsContextsMemory},
              {"stacks.update-too-big",
               "UpdateStack to a plan that does not fit is RESOURCE_EXHAUSTED and changes nothing",
               RefusesUpdatesThatDoNotFit},
              {"stacks.delete",
               "DeleteStack takes the stack out of the list, and a second one is NOT_FOUND",
               [](Daemon& daemon) {
                 const OwnStack stack(daemon, SmallConfig());
                 daemon.Ok(Delete(stack.name()));
                 daemon.Refuses(Delete(stack.name()), Code::NOT_FOUND, {stack.name()});
                 const auto listed = daemon.Ok(v1::ListStacksRequest());
                 for (const auto& other : listed.stacks())
                   Require(other.name() != stack.name(), "the deleted stack is listed");
               }},
              {"stacks.delete-contexts",
               "After DeleteStack its contexts are FAILED_PRECONDITION and other calls NOT_FOUND",
               DeletesContextsToo},
              {"stacks.plan", "PlanMemory gives what CreateStack allocates, to the byte",
               PlansToTheByte},
              {"stacks.plan-fields", "PlanMemory refuses what CreateStack refuses, as it does",
               [](Daemon& daemon) { RefusesEachBadField(daemon, Plan); }},
              {"stacks.plan-too-big", "PlanMemory plans what does not fit and says so",
               [](Daemon& daemon) {
                 const auto planned = daemon.Ok(Plan(TooBig(daemon)));
                 Require(planned.plan().total_bytes() > planned.device_free_bytes(),
                         "fits is false, and ", planned.plan().total_bytes(),
                         " bytes are no more than the ", planned.device_free_bytes(), " free ones");
               }},
          }};
}

}  // namespace lamina::conformance
