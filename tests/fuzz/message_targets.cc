// Every request message into its handler, and sequences of them.
#include <cctype>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "tests/fuzz/daemon.h"
#include "tests/fuzz/message_mutator.h"
#include "tests/fuzz/target.h"

namespace lamina::fuzz {
namespace {

using google::protobuf::Message;

// The input as it comes over the wire, or null where it cannot: text that is none of this message,
// or a string that is no UTF-8.
std::unique_ptr<Message> Received(const Message& form, absl::string_view input) {
  std::unique_ptr<Message> written(form.New());
  if (!ParseText(input, written.get())) return nullptr;
  std::unique_ptr<Message> read(form.New());
  if (!read->ParseFromString(written->SerializeAsString())) return nullptr;
  return read;
}

// "StreamParametersRequest": "stream_parameters".
std::string NameOf(const Message& request) {
  std::string name;
  for (const char c : std::string(absl::StripSuffix(request.GetDescriptor()->name(), "Request"))) {
    if (std::isupper(static_cast<unsigned char>(c)) != 0 && !name.empty()) name += '_';
    name += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return name;
}

Target OneRequest(const Message& form) {
  return {NameOf(form), absl::StrCat(form.GetDescriptor()->name(), " into its handler"), &form,
          [&form](absl::string_view input) {
            const auto request = Received(form, input);
            if (request == nullptr) return;
            Daemon& daemon = Daemon::Get();
            daemon.Bind(request.get());
            (void)daemon.Call(*request);
            daemon.End();
          }};
}

void RunExecute(absl::string_view input) {
  const auto stream = Received(ExecuteStream::default_instance(), input);
  if (stream == nullptr) return;
  Daemon& daemon = Daemon::Get();
  daemon.Bind(stream.get());
  (void)daemon.Call(*stream);
  daemon.End();
}

void RunKeepAlive(absl::string_view input) {
  const auto stream = Received(KeepAliveStream::default_instance(), input);
  if (stream == nullptr) return;
  Daemon& daemon = Daemon::Get();
  daemon.Bind(stream.get());
  daemon.KeepAlive(static_cast<const KeepAliveStream&>(*stream));
  daemon.End();
}

void RunCalls(absl::string_view input) {
  const auto calls = Received(Calls::default_instance(), input);
  if (calls == nullptr) return;
  Daemon& daemon = Daemon::Get();
  for (Call& call : *static_cast<Calls&>(*calls).mutable_calls()) {
    const google::protobuf::FieldDescriptor* const request =
        call.GetReflection()->GetOneofFieldDescriptor(call, Call::descriptor()->oneof_decl(0));
    if (request == nullptr) continue;
    Message* const message = call.GetReflection()->MutableMessage(&call, request);
    daemon.Bind(message);  // what the calls before made is there by now
    (void)daemon.Call(*message);
  }
  daemon.End();
}

}  // namespace

std::vector<Target> MessageTargets() {
  std::vector<Target> targets;
  // Every call of calls.proto is an RPC of the contract, and so a target of its own.
  const google::protobuf::Descriptor* const call = Call::descriptor();
  for (int i = 0; i < call->field_count(); ++i) {
    if (call->field(i)->message_type() == ExecuteStream::descriptor()) continue;
    targets.push_back(
        OneRequest(*google::protobuf::MessageFactory::generated_factory()->GetPrototype(
            call->field(i)->message_type())));
  }
  targets.push_back({"execute", "the messages of one Execute stream",
                     &ExecuteStream::default_instance(), RunExecute});
  targets.push_back({"keep_alive", "the messages of one KeepAlive stream, through gRPC",
                     &KeepAliveStream::default_instance(), RunKeepAlive});
  targets.push_back(
      {"calls", "requests of all kinds, one after another", &Calls::default_instance(), RunCalls});
  return targets;
}

}  // namespace lamina::fuzz
