// Changes protobuf messages as messages, so that inputs get past the parser: fields come, go and
// take other values, each of its type, rather than bytes.
//
// (libprotobuf-mutator does this; Debian 12 has no package of it.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>

#include "absl/strings/string_view.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"

namespace lamina::fuzz {

// False, and some of the fields, where the text is none of this message.
bool ParseText(absl::string_view text, google::protobuf::Message* message);
std::string PrintText(const google::protobuf::Message& message);

class MessageMutator {
 public:
  // libFuzzer's: changes bytes in place, up to a size; the new size.
  using MutateBytes = size_t (*)(uint8_t* data, size_t size, size_t max_size);
  // The same seed makes the same changes.
  MessageMutator(uint32_t seed, MutateBytes mutate_bytes);

  // A few changes somewhere in the message, then most often what makes a request worth running:
  // sizes that fit the shapes, ids that are there, sequences in order.
  void Mutate(google::protobuf::Message* message);
  // Puts a part of `other` into the message, where one of its type is or can be.
  void Cross(google::protobuf::Message* message, const google::protobuf::Message& other);

 private:
  using Field = google::protobuf::FieldDescriptor;
  using Message = google::protobuf::Message;

  bool OneIn(uint32_t n) { return random_() % n == 0; }
  uint64_t Bits() { return (uint64_t{random_()} << 32) | random_(); }

  void ChangeOne(Message* message);
  void ChangeField(Message* message, const Field* field);
  void ChangeRepeated(Message* message, const Field* field);
  // A value for a field; `index` of a repeated one, or -1.
  void SetValue(Message* message, const Field* field, int index);
  void AddValue(Message* message, const Field* field);
  int64_t Integer(int64_t old);
  double Real(double old);
  std::string Text(const Field* field, const std::string& old);
  void Fill(Message* message, int depth);

  void Mend(Message* message);
  void MendOne(Message* message, uint64_t* sequence, uint64_t* id);

  std::mt19937 random_;
  MutateBytes mutate_bytes_;
};

}  // namespace lamina::fuzz
