// lamina: drives a laminad from the command line.
#include <cmath>
#include <cstdlib>
#include <functional>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "cli/byte_size.h"
#include "cli/commands.h"
#include "cli/config_flags.h"
#include "cli/offline_plan.h"

namespace lamina::cli {
namespace {

constexpr const char* kFooter = R"(
Exit codes:
  0  it worked; for health: the daemon serves
  1  the daemon refused or failed (the message has the status code), or a result could not be written
  2  wrong arguments, or a file that was given is not what it should be
  3  no daemon answers at the target
Errors go to stderr, with --output json as {"error": {"code", "message", "exit_code", "request_id"}}; the request id is
what the log of the daemon calls the call.)";

using Action = std::function<int()>;

// "8x128": B and S.
std::pair<int64_t, int64_t> ParseShape(const std::string& text) {
  const size_t by = text.find('x');
  std::pair<int64_t, int64_t> shape;
  if (by == std::string::npos || !absl::SimpleAtoi(text.substr(0, by), &shape.first) ||
      !absl::SimpleAtoi(text.substr(by + 1), &shape.second) || shape.first < 1 ||
      shape.second < 1) {
    throw CLI::ValidationError("--shape", "'" + text + "' is not BxS, such as 8x128");
  }
  return shape;
}

// Every command's options and what to do with them; lives until the command has run.
class Commands {
 public:
  explicit Commands(CLI::App* app) : app_(app) {
    AddGlobals();
    AddService();
    AddStack();
    AddPlan();
    AddRun();
    AddCheckpoint();
    AddBench();
    AddParameters();
    AddConformance();
  }
  int Run() { return action_(); }
  const GlobalOptions& globals() const { return globals_; }

 private:
  void Do(CLI::App* command, Action action, bool prints_csv = false) {
    command->callback([this, action = std::move(action), prints_csv] {
      action_ = globals_.csv && !prints_csv
                    ? [this] { return FailUsage(globals_, kCsvIsForCapacity); }
                    : action;
    });
  }

  void AddGlobals() {
    app_->add_option(
            "--target", globals_.target,
            "Daemon: unix:PATH, HOST:PORT or an absolute path [its default socket: "
            "/run/lamina/laminad.sock for root, $XDG_RUNTIME_DIR/lamina/laminad.sock else]")
        ->envname("LAMINA_TARGET")
        ->type_name("TARGET");
    app_->add_option_function<std::string>(
            "--output",
            [this](const std::string& form) {
              globals_.json = form == "json";
              globals_.csv = form == "csv";
            },
            "How results are printed: text (or table), json, or csv for plan --memory [text]")
        ->check(CLI::IsMember({"text", "table", "json", "csv"}))
        ->type_name("")
        ->trigger_on_parse();
    app_->add_option("--timeout", globals_.timeout_seconds,
                     "Longest time for each call to the daemon; 0: none [60]")
        ->check([](const std::string& text) {
          const double seconds = std::strtod(text.c_str(), nullptr);
          return std::isfinite(seconds) && seconds >= 0 && seconds <= 1e6
                     ? ""
                     : "must be 0 to 1000000 seconds";
        })
        ->type_name("SECONDS");
    AddSecurity();
    app_->set_version_flag("--version", "lamina " LAMINA_VERSION);
    app_->require_subcommand(1);
    app_->fallthrough();  // global options may follow the command
    app_->footer(kFooter);
  }

  void AddSecurity() {
    client::Security& security = globals_.security;
    const auto add = [this](const char* flag, std::string* value, const char* variable,
                            const char* type, const char* help) {
      app_->add_option(flag, *value, help)
          ->envname(variable)
          ->type_name(type)
          ->group("Options for daemons over TCP");
    };
    app_->add_flag("--tls", security.tls, "TLS, with the authorities that this system trusts")
        ->envname("LAMINA_TLS")
        ->group("Options for daemons over TCP");
    add("--tls-ca", &security.ca_file, "LAMINA_TLS_CA", "FILE",
        "TLS, with the authorities in this file; PEM");
    add("--tls-server-name", &security.server_name, "LAMINA_TLS_SERVER_NAME", "NAME",
        "The name in the daemon's certificate [the target's host]");
    add("--client-cert", &security.certificate_file, "LAMINA_CLIENT_CERT", "FILE",
        "This client's certificate; PEM");
    add("--client-key", &security.key_file, "LAMINA_CLIENT_KEY", "FILE", "Its private key; PEM");
    add("--token-file", &security.token_file, "LAMINA_TOKEN_FILE", "FILE",
        "Holds the bearer token to show to the daemon");
    app_->add_flag("--insecure", security.insecure,
                   "No TLS, whatever else is said, and the token unencrypted also to other hosts")
        ->group("Options for daemons over TCP");
  }

  CLI::App* AddNamed(CLI::App* parent, const char* name, const char* help, std::string* stack,
                     const char* what = "NAME") {
    CLI::App* command = parent->add_subcommand(name, help);
    command->add_option(what, *stack, "The stack's name")->required();
    return command;
  }

  void AddService() {
    Do(app_->add_subcommand("info", "What the daemon is and offers"),
       [this] { return Info(globals_); });
    Do(app_->add_subcommand("health", "Exit 0 when the daemon serves, for container probes"),
       [this] { return Health(globals_); });
    CLI::App* status = app_->add_subcommand(
        "status",
        "What the daemon's page /statusz shows: stacks, memory, sessions, the last steps.\nIt is "
        "asked over HTTP.");
    status
        ->add_option("--metrics", metrics_,
                     "Its HTTP server, where the daemon need not be asked for it: "
                     "http://HOST:PORT or HOST:PORT")
        ->type_name("URL");
    Do(status, [this] { return Status(globals_, metrics_); });
  }

  void AddStack() {
    CLI::App* stack = app_->add_subcommand("stack", "Make, describe, change and delete stacks");
    stack->require_subcommand(1);
    CLI::App* create = AddNamed(stack, "create", "Allocate a stack and draw its weights", &stack_);
    create_config_.AddTo(create);
    Do(create, [this] {
      return WithConfig(create_config_, [this](const client::StackConfig& config) {
        return CreateStack(globals_, stack_, config);
      });
    });
    Do(stack->add_subcommand("list", "All stacks"), [this] { return ListStacks(globals_); });
    Do(AddNamed(stack, "show", "One stack", &stack_),
       [this] { return ShowStack(globals_, stack_); });
    Do(AddNamed(stack, "delete", "Free a stack and its contexts", &stack_),
       [this] { return DeleteStack(globals_, stack_); });
    CLI::App* update = AddNamed(stack, "update", "Change what can change on a live stack", &stack_);
    update->add_option("--attn-dropout-ratio", update_.attn_dropout_ratio, "p in [0, 1)")
        ->type_name("X");
    update->add_option("--hidden-dropout-ratio", update_.hidden_dropout_ratio, "p in [0, 1)")
        ->type_name("X");
    update->add_flag_function(
        "--training,!--no-training", [this](int64_t count) { update_.training = count > 0; },
        "Keep gradients, optimizer state and contexts, or free them");
    const auto memory_flag = [&](const std::string& name, std::optional<bool>* field,
                                 const char* help) {
      update->add_flag_function(
          "--" + name + ",!--no-" + name, [field](int64_t count) { *field = count > 0; }, help);
    };
    memory_flag("normalize-invertible", &update_.normalize_invertible,
                "Drop the norms' inputs, recover them in Backward");
    memory_flag("gelu-checkpoint", &update_.gelu_checkpoint,
                "Drop the GELU output, recompute it in Backward");
    memory_flag("attn-dropout-checkpoint", &update_.attn_dropout_checkpoint,
                "Drop the attention dropout's output, which nothing stores anyway");
    memory_flag("activation-checkpointing", &update_.activation_checkpointing,
                "Keep each layer's input alone, recompute it in Backward");
    memory_flag("stochastic-mode", &update_.stochastic_mode, "Allow unordered reductions");
    Do(update, [this] { return UpdateStack(globals_, stack_, update_); });
  }

  void AddPlan() {
    CLI::App* plan = app_->add_subcommand(
        "plan",
        "What a config would allocate, to the byte; with --memory: how large a micro-batch fits, "
        "and which memory flags it needs.\nThe daemon plans for its own device. With --device or "
        "--memory this command does, and needs neither a daemon nor a GPU.");
    plan->add_option("--model", plan_.model, "Layers of a known model: " + ModelNames())
        ->type_name("NAME");
    plan->add_option("--device", plan_.device,
                     "Plan here, for a Hopper card or for this machine's cores [with --memory: "
                     "cuda]")
        ->check(CLI::IsMember({"cuda", "cpu"}))
        ->type_name("cuda|cpu");
    plan->add_option_function<std::string>(
            "--memory",
            [this](const std::string& size) {
              const absl::StatusOr<uint64_t> bytes = ParseByteSize(size);
              if (!bytes.ok()) {
                throw CLI::ValidationError("--memory", std::string(bytes.status().message()));
              }
              plan_.memory = *bytes;
            },
            "What the stack may take, such as 32GiB or 80GB: prints a row for each range of "
            "micro-batches that needs the same flags. One context; dtype is bf16 unless given")
        ->type_name("SIZE");
    plan->add_option("--seq", plan_.seqs, "Sequence lengths of --memory's table [128,512]")
        ->delimiter(',')
        ->type_name("S,...");
    plan_config_.AddTo(plan);
    Do(
        plan, [this] { return Plan(globals_, plan_, plan_config_); }, /*prints_csv=*/true);
  }

  void AddRun() {
    CLI::App* run = AddNamed(app_, "run", "Evaluate a stack over .npy files", &run_.stack, "STACK");
    run->add_option("--input", run_.input_file, "[B, S, H], fp32 or fp16")
        ->required()
        ->type_name("X.npy");
    CLI::Option* mask =
        run->add_option("--mask", run_.mask_file, "Additive mask, fp32 [B, 1, 1, S] or [B, S]")
            ->type_name("M.npy");
    run->add_option("--lengths", run_.lengths_file, "Valid lengths, integers [B]")
        ->type_name("L.npy")
        ->excludes(mask);
    run->add_option("--output-file", run_.output_file,
                    "Where the output goes: fp16 for an fp16 stack, else fp32")
        ->type_name("Y.npy");
    run->add_option("--layers", run_.layers, "Layers [BEGIN, END) [all]")->type_name("BEGIN:END");
    Do(run, [this] { return cli::Run(globals_, run_); });
  }

  void AddCheckpoint() {
    CLI::App* checkpoint = app_->add_subcommand(
        "checkpoint", "Save and load checkpoints; import and export pretrained models");
    checkpoint->require_subcommand(1);
    const auto name_option = [this](CLI::App* command) {
      command->add_option("--name", checkpoint_, "The file's name without ending [the stack's]")
          ->type_name("NAME");
    };
    CLI::App* save = AddNamed(checkpoint, "save",
                              "Write weights, optimizer state and counters to "
                              "the daemon's checkpoint folder",
                              &stack_, "STACK");
    name_option(save);
    Do(save, [this] { return SaveCheckpoint(globals_, stack_, checkpoint_); });
    CLI::App* load = AddNamed(checkpoint, "load",
                              "Read a checkpoint into a stack of the same shape", &stack_, "STACK");
    name_option(load);
    load->add_flag("--create", create_, "Make the stack from the config in the file");
    Do(load, [this] { return LoadCheckpoint(globals_, stack_, checkpoint_, create_); });

    // hf-bert is the one format that there is; naming it keeps scripts right when others come.
    const auto format_option = [](CLI::App* command) {
      command->add_option("--format", "hf-bert: Hugging Face's BERT in safetensors [hf-bert]")
          ->check(CLI::IsMember({"hf-bert"}))
          ->type_name("");
    };
    CLI::App* import = checkpoint->add_subcommand(
        "import",
        "Make a stack from a pretrained model's files on this host.\nThe config comes from the "
        "config.json beside them; batch-size is 8 and max-seq-length the model's positions unless "
        "flags say otherwise.");
    import
        ->add_option("PATH", import_.path,
                     "Its folder, or its .safetensors or .safetensors.index.json file")
        ->required();
    format_option(import);
    import->add_option("--name", import_.name, "The new stack's name [PATH's last part]")
        ->type_name("STACK");
    import
        ->add_option("--prefix", import_.prefix,
                     "What tensors' names have before 'layer.', where there are several encoders")
        ->type_name("PREFIX");
    import_config_.AddTo(import);
    Do(import, [this] { return ImportCheckpoint(globals_, import_, import_config_); });

    CLI::App* to = AddNamed(checkpoint, "export",
                            "Write a stack's weights as a pretrained model's files on this host",
                            &export_.stack, "STACK");
    to->add_option("PATH", export_.path,
                   "A file where it ends in .safetensors, else a folder. config.json comes beside "
                   "it unless there is one")
        ->required();
    format_option(to);
    to->add_option("--base", export_.base,
                   "The model that was imported: its other tensors, names, types and metadata are "
                   "copied")
        ->type_name("PATH");
    to->add_option("--prefix", export_.prefix,
                   "What tensors' names have before 'layer.' [the base's, else encoder.]")
        ->type_name("PREFIX");
    to->add_option_function<std::string>(
          "--dtype", [this](const std::string& name) { export_.dtype = client::ParseDType(name); },
          "Type of the tensors where there is no base [fp32]")
        ->check(CLI::IsMember({"fp32", "bf16", "fp16"}))
        ->type_name("fp32|bf16|fp16");
    Do(to, [this] { return ExportCheckpoint(globals_, export_); });
  }

  void AddBench() {
    CLI::App* bench = AddNamed(
        app_, "bench",
        "Drive a stack with one client or many, and time its calls.\nA step is a forward and "
        "its backward. Advances the dropout counter and leaves zeroed gradients behind; "
        "weights stay. Calls that a busy daemon refuses are counted by status; other errors "
        "end the run.",
        &bench_.stack, "STACK");
    const auto extent = [bench](const char* flag, int64_t* value, const char* help) {
      return bench->add_option(flag, *value, help)->check(CLI::PositiveNumber)->type_name("N");
    };
    CLI::Option* batch = extent("--batch", &bench_.batch, "B [the stack's batch-size]");
    CLI::Option* seq = extent("--seq", &bench_.seq, "S [the stack's max-seq-length]");
    bench
        ->add_option_function<std::vector<std::string>>(
            "--shape",
            [this](const std::vector<std::string>& shapes) {
              for (const std::string& shape : shapes) bench_.shapes.push_back(ParseShape(shape));
            },
            "B and S, such as 8x128; repeatable: each is measured by itself")
        ->delimiter(',')
        ->excludes(batch)
        ->excludes(seq)
        ->type_name("BxS");
    bench
        ->add_option("--seconds", bench_.seconds,
                     "How long to measure each transport and shape, 0 to 3600 [5]")
        ->check(CLI::Range(0.0, 3600.0))
        ->type_name("N");
    bench->add_option("--warmup", bench_.warmup, "Steps of each client before, not counted [3]")
        ->check(CLI::Range(0, 1000000))
        ->type_name("N");
    bench
        ->add_option_function<std::string>(
            "--transport",
            [this](const std::string& transport) {
              bench_.regions = transport != "inline";
              bench_.inline_tensors = transport != "regions";
            },
            "Which to measure: regions, inline or both [both]")
        ->check(CLI::IsMember({"regions", "inline", "both"}))
        ->type_name("");
    bench->add_flag("--forward-only", bench_.forward_only, "Evaluation forwards alone");
    bench
        ->add_option("--concurrency", bench_.concurrency,
                     "Clients, each with a connection and a session of its own, 1 to 1024 [1]")
        ->check(CLI::Range(1, 1024))
        ->type_name("N");
    bench
        ->add_option_function<std::string>(
            "--calls", [this](const std::string& calls) { bench_.pipeline = calls == "pipeline"; },
            "unary: a client waits for each answer; pipeline: it has several calls under way on a "
            "stream [unary]")
        ->check(CLI::IsMember({"unary", "pipeline"}))
        ->type_name("");
    bench
        ->add_option("--depth", bench_.depth,
                     "With --calls pipeline: calls of a client under way at most, 1 to 63 [32]")
        ->check(CLI::Range(1, 63))
        ->type_name("N");
    bench
        ->add_option_function<double>(
            "--rate",
            [this](const double& rate) {
              if (!(rate > 0 && rate <= 1e6)) {
                throw CLI::ValidationError("--rate", "must be above 0 and at most 1000000");
              }
              bench_.rate = rate;
            },
            "Open loop: so many steps a second arrive, of all clients together, at random "
            "(Poisson); latency counts from the arrival, also where no client is free. Else each "
            "client begins a step when its last one is done")
        ->type_name("R");
    bench->add_option("--seed", bench_.seed, "With --rate: of the arrivals [1]")->type_name("N");
    Do(bench, [this] {
      if (bench_.depth.has_value() && !bench_.pipeline) {
        return FailUsage(globals_, "--depth needs --calls pipeline");
      }
      if (bench_.seed.has_value() && bench_.rate == 0) {
        return FailUsage(globals_, "--seed needs --rate");
      }
      return Bench(globals_, bench_);
    });
  }

  void AddParameters() {
    CLI::App* params = app_->add_subcommand("params", "A stack's parameters");
    params->require_subcommand(1);
    Do(AddNamed(params, "list", "Names and shapes", &stack_, "STACK"),
       [this] { return ListParameters(globals_, stack_); });
  }

  void AddConformance() {
    CLI::App* conformance = app_->add_subcommand(
        "conformance",
        "Check a live daemon against the whole contract: every call, its status codes, handles, "
        "sessions, exactly-once, gradients.\nUses sessions and stacks of its own, small and "
        "deleted afterwards, and leaves others alone. Prints a line a check and ends with 'N "
        "passed, N failed' (', N skipped': what this daemon offers no way to see); exit code 1 "
        "where one failed.");
    conformance
        ->add_option("--only", conformance_.only,
                     "Checks whose names fit, such as handles, 'sessions.keep-alive*'; repeatable "
                     "[all]")
        ->delimiter(',')
        ->type_name("GLOB");
    conformance->add_flag("--list", conformance_.list,
                          "Print the checks and the rules that they check; needs no daemon");
    conformance->add_flag("--slow", conformance_.slow,
                          "Wait for the end of leases of more than 5 seconds too");
    conformance
        ->add_option("--json", conformance_.json_file,
                     "Write the results there too, with the status codes that each call answered")
        ->type_name("FILE");
    Do(conformance, [this] { return Conformance(globals_, conformance_); });
  }

  int WithConfig(const ConfigFlags& flags,
                 const std::function<int(const client::StackConfig&)>& run) {
    const absl::StatusOr<client::StackConfig> config = flags.Resolve();
    if (!config.ok()) return FailUsage(globals_, std::string(config.status().message()));
    return run(*config);
  }

  CLI::App* app_;
  GlobalOptions globals_;
  ConfigFlags create_config_, plan_config_, import_config_;
  PlanOptions plan_;
  ImportOptions import_;
  ExportOptions export_;
  client::StackUpdate update_;
  RunOptions run_;
  BenchOptions bench_;
  ConformanceOptions conformance_;
  std::string stack_, checkpoint_, metrics_;
  bool create_ = false;
  Action action_;
};

int Main(int argc, char** argv) {
  // gRPC's own log lines would come between; every failure is reported by its status.
  setenv("GRPC_VERBOSITY", "NONE", /*replace=*/0);
  CLI::App app("Drives a laminad: the daemon that owns a transformer stack on one device.",
               "lamina");
  Commands commands(&app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& done) {  // --help, --version
    return app.exit(done);
  } catch (const CLI::ParseError& error) {
    // CLI11 asks for a command where it was given one that it does not know.
    const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
    const bool command = error.get_exit_code() == static_cast<int>(CLI::ExitCodes::RequiredError) &&
                         !unknown.empty() && unknown.front().front() != '-';
    return FailUsage(commands.globals(),
                     (command ? "there is no command '" + unknown.front() + "'" : error.what()) +
                         " (see lamina --help)");
  }
  return commands.Run();
}

}  // namespace
}  // namespace lamina::cli

int main(int argc, char** argv) { return lamina::cli::Main(argc, argv); }
