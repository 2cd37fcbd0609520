// libFuzzer's entry points. The target is named by --target=NAME, which libFuzzer passes over.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "tests/fuzz/message_mutator.h"
#include "tests/fuzz/target.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using lamina::fuzz::Target;

const Target* target = nullptr;

// The text as the target's message; an empty one where it is none.
std::unique_ptr<google::protobuf::Message> Parse(const uint8_t* data, size_t size) {
  std::unique_ptr<google::protobuf::Message> message(target->form->New());
  if (!lamina::fuzz::ParseText({reinterpret_cast<const char*>(data), size}, message.get()))
    message->Clear();
  return message;
}

// As text into `data`; what was there stays where there is no room.
size_t Print(const google::protobuf::Message& message, uint8_t* data, size_t size,
             size_t max_size) {
  const std::string text = lamina::fuzz::PrintText(message);
  if (text.size() > max_size) return size;
  std::memcpy(data, text.data(), text.size());
  return text.size();
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  for (int i = 1; i < *argc; ++i) {
    const std::string argument = (*argv)[i];
    if (argument == "--list") {
      for (const Target& t : lamina::fuzz::Targets())
        std::printf("%-18s %s\n", t.name.c_str(), t.about.c_str());
      std::exit(0);
    }
    if (argument.rfind("--target=", 0) != 0) continue;
    for (const Target& t : lamina::fuzz::Targets())
      if (argument.substr(9) == t.name) target = &t;
  }
  if (target == nullptr) {
    std::fprintf(stderr, "lamina_fuzz: needs --target=NAME, one of those that --list lists\n");
    std::exit(2);
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  target->run({reinterpret_cast<const char*>(data), size});
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned int seed) {
  if (target->form == nullptr) return LLVMFuzzerMutate(data, size, max_size);
  const auto message = Parse(data, size);
  lamina::fuzz::MessageMutator(seed, LLVMFuzzerMutate).Mutate(message.get());
  return Print(*message, data, size, max_size);
}

extern "C" size_t LLVMFuzzerCustomCrossOver(const uint8_t* data1, size_t size1,
                                            const uint8_t* data2, size_t size2, uint8_t* out,
                                            size_t max_size, unsigned int seed) {
  if (target->form == nullptr) {
    // The beginning of one, the end of the other.
    const size_t head = size1 == 0 ? 0 : seed % (size1 + 1);
    const size_t tail = size2 == 0 ? 0 : (seed >> 16) % (size2 + 1);
    const size_t from_head = std::min(head, max_size);
    const size_t from_tail = std::min(tail, max_size - from_head);
    if (from_head > 0) std::memcpy(out, data1, from_head);
    if (from_tail > 0) std::memcpy(out + from_head, data2 + size2 - from_tail, from_tail);
    return from_head + from_tail;
  }
  const auto message = Parse(data1, size1);
  lamina::fuzz::MessageMutator(seed, LLVMFuzzerMutate).Cross(message.get(), *Parse(data2, size2));
  return Print(*message, out, 0, max_size);
}
