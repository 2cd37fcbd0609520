#include "tests/fuzz/message_mutator.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <memory>
#include <vector>

#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"
#include "lamina/v1/layer_service.pb.h"
#include "lamina/v1/tensor.pb.h"

namespace lamina::fuzz {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr int kMaxDepth = 6;
constexpr size_t kMaxBytes = 4096;  // of one string
constexpr int kMaxRepeats = 24;

constexpr const char* kIds[] = {"live", "other", ""};
constexpr const char* kStackNames[] = {"s", "h", "e", "new", "none", ""};
constexpr const char* kParameters[] = {
    "layers.0.attn_qkvw", "layers.0.attn_qkvb", "layers.0.attn_ow", "layers.1.attn_ob",
    "layers.0.attn_nw",   "layers.1.attn_nb",   "layers.0.inter_w", "layers.1.inter_b",
    "layers.0.output_w",  "layers.0.output_b",  "layers.1.norm_w",  "layers.0.norm_b",
    "layers.0.attn_qw",   "layers.1.attn_kb",   "layers.1.attn_vw", "layers.2.norm_w",
    "layers.-1.norm_w",   "layers.0."};
constexpr const char* kNames[] = {"s", "new", "a", "../a", ".a", "a b"};

// Every message in the tree, the root among them.
void Collect(Message* message, std::vector<Message*>* all) {
  all->push_back(message);
  std::vector<const FieldDescriptor*> fields;
  const Reflection* const reflection = message->GetReflection();
  reflection->ListFields(*message, &fields);
  for (const FieldDescriptor* field : fields) {
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) continue;
    if (!field->is_repeated()) {
      Collect(reflection->MutableMessage(message, field), all);
      continue;
    }
    for (int i = 0; i < reflection->FieldSize(*message, field); ++i)
      Collect(reflection->MutableRepeatedMessage(message, field, i), all);
  }
}

int64_t ElementBytes(v1::DataType dtype) {
  return dtype == v1::DATA_TYPE_BFLOAT16 || dtype == v1::DATA_TYPE_FLOAT16 ? 2 : 4;
}

// What its shape takes; 0 where that is nothing or much.
size_t BytesOf(const v1::Tensor& tensor) {
  int64_t bytes = ElementBytes(tensor.dtype());
  for (const int64_t extent : tensor.shape()) {
    if (extent < 1 || extent > static_cast<int64_t>(kMaxBytes)) return 0;
    bytes *= extent;
    if (bytes > static_cast<int64_t>(kMaxBytes)) return 0;
  }
  return static_cast<size_t>(bytes);
}

class Silent final : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int, google::protobuf::io::ColumnNumber, const std::string&) override {}
};

}  // namespace

bool ParseText(absl::string_view text, Message* message) {
  google::protobuf::TextFormat::Parser parser;
  Silent silent;
  parser.RecordErrorsTo(&silent);
  parser.SetRecursionLimit(32);
  return parser.ParseFromString(std::string(text), message);
}

std::string PrintText(const Message& message) {
  std::string text;
  google::protobuf::TextFormat::PrintToString(message, &text);
  return text;
}

MessageMutator::MessageMutator(uint32_t seed, MutateBytes mutate_bytes)
    : random_(seed), mutate_bytes_(mutate_bytes) {}

void MessageMutator::Mutate(Message* message) {
  for (int i = 0; i == 0 || (i < 6 && OneIn(2)); ++i) ChangeOne(message);
  if (!OneIn(8)) Mend(message);
}

void MessageMutator::ChangeOne(Message* message) {
  std::vector<Message*> all;
  Collect(message, &all);
  Message* const at = all[random_() % all.size()];
  const Descriptor* const type = at->GetDescriptor();
  if (type->field_count() == 0) return;
  ChangeField(at, type->field(static_cast<int>(random_() % type->field_count())));
}

void MessageMutator::ChangeField(Message* message, const Field* field) {
  if (field->is_repeated()) return ChangeRepeated(message, field);
  const Reflection* const reflection = message->GetReflection();
  if (reflection->HasField(*message, field) && OneIn(4))
    reflection->ClearField(message, field);
  else
    SetValue(message, field, -1);
}

void MessageMutator::ChangeRepeated(Message* message, const Field* field) {
  const Reflection* const reflection = message->GetReflection();
  const int size = reflection->FieldSize(*message, field);
  const auto any = [&] { return static_cast<int>(random_() % static_cast<uint32_t>(size)); };
  if (size == 0 || (size < kMaxRepeats && OneIn(3))) return AddValue(message, field);
  switch (random_() % 4) {
    case 0:
      return reflection->RemoveLast(message, field);
    case 1:
      return reflection->SwapElements(message, field, any(), any());
    case 2:
      // Once more what is there already.
      if (field->cpp_type() == Field::CPPTYPE_MESSAGE && size < kMaxRepeats) {
        const std::unique_ptr<Message> copy(
            reflection->GetRepeatedMessage(*message, field, any()).New());
        copy->CopyFrom(reflection->GetRepeatedMessage(*message, field, any()));
        reflection->AddMessage(message, field)->CopyFrom(*copy);
        return;
      }
      [[fallthrough]];
    default:
      return SetValue(message, field, any());
  }
}

void MessageMutator::AddValue(Message* message, const Field* field) {
  const Reflection* const r = message->GetReflection();
  switch (field->cpp_type()) {
    case Field::CPPTYPE_INT32:
      r->AddInt32(message, field, 0);
      break;
    case Field::CPPTYPE_INT64:
      r->AddInt64(message, field, 0);
      break;
    case Field::CPPTYPE_UINT32:
      r->AddUInt32(message, field, 0);
      break;
    case Field::CPPTYPE_UINT64:
      r->AddUInt64(message, field, 0);
      break;
    case Field::CPPTYPE_DOUBLE:
      r->AddDouble(message, field, 0);
      break;
    case Field::CPPTYPE_FLOAT:
      r->AddFloat(message, field, 0);
      break;
    case Field::CPPTYPE_BOOL:
      r->AddBool(message, field, false);
      break;
    case Field::CPPTYPE_ENUM:
      r->AddEnumValue(message, field, 0);
      break;
    case Field::CPPTYPE_STRING:
      r->AddString(message, field, "");
      break;
    case Field::CPPTYPE_MESSAGE:
      Fill(r->AddMessage(message, field), 1);
      return;
  }
  SetValue(message, field, r->FieldSize(*message, field) - 1);
}

void MessageMutator::Fill(Message* message, int depth) {
  const Descriptor* const type = message->GetDescriptor();
  for (int i = 0; i < type->field_count(); ++i) {
    const Field* const field = type->field(i);
    if (!OneIn(type->field_count() > 8 ? 6 : 2)) continue;
    if (field->is_repeated()) {
      if (depth < kMaxDepth) AddValue(message, field);
    } else if (field->cpp_type() == Field::CPPTYPE_MESSAGE) {
      if (depth < kMaxDepth)
        Fill(message->GetReflection()->MutableMessage(message, field), depth + 1);
    } else {
      SetValue(message, field, -1);
    }
  }
}

void MessageMutator::SetValue(Message* message, const Field* field, int index) {
  const Reflection* const r = message->GetReflection();
// The old value and the new one, of a field or of one of a repeated field's.
#define LAMINA_CHANGE(Kind, expression)                                                           \
  {                                                                                               \
    const auto old =                                                                              \
        index < 0 ? r->Get##Kind(*message, field) : r->GetRepeated##Kind(*message, field, index); \
    const auto value = expression;                                                                \
    if (index < 0)                                                                                \
      r->Set##Kind(message, field, value);                                                        \
    else                                                                                          \
      r->SetRepeated##Kind(message, field, index, value);                                         \
    break;                                                                                        \
  }
  switch (field->cpp_type()) {
    case Field::CPPTYPE_INT32:
      LAMINA_CHANGE(Int32, static_cast<int32_t>(Integer(old)))
    case Field::CPPTYPE_INT64:
      LAMINA_CHANGE(Int64, Integer(old))
    case Field::CPPTYPE_UINT32:
      LAMINA_CHANGE(UInt32, static_cast<uint32_t>(Integer(old)))
    case Field::CPPTYPE_UINT64:
      LAMINA_CHANGE(UInt64, static_cast<uint64_t>(Integer(static_cast<int64_t>(old))))
    case Field::CPPTYPE_DOUBLE:
      LAMINA_CHANGE(Double, Real(old))
    case Field::CPPTYPE_FLOAT:
      LAMINA_CHANGE(Float, static_cast<float>(Real(old)))
    case Field::CPPTYPE_BOOL:
      LAMINA_CHANGE(Bool, !old)
    case Field::CPPTYPE_ENUM:
      LAMINA_CHANGE(
          EnumValue,
          OneIn(8) ? static_cast<int>(Integer(old))
                   : field->enum_type()
                         ->value(static_cast<int>(random_() % field->enum_type()->value_count()))
                         ->number())
    case Field::CPPTYPE_STRING:
      LAMINA_CHANGE(String, Text(field, old))
    case Field::CPPTYPE_MESSAGE: {
      Message* const inner = index < 0 ? r->MutableMessage(message, field)
                                       : r->MutableRepeatedMessage(message, field, index);
      Fill(inner, 1);
      break;
    }
  }
#undef LAMINA_CHANGE
}

int64_t MessageMutator::Integer(int64_t old) {
  switch (random_() % 8) {
    case 0:
      return static_cast<int64_t>(Bits());
    case 1:
      return static_cast<int64_t>(Bits() & ((uint64_t{1} << (random_() % 63 + 1)) - 1));
    case 2: {
      constexpr int64_t kEnds[] = {0,
                                   -1,
                                   std::numeric_limits<int64_t>::max(),
                                   std::numeric_limits<int64_t>::min(),
                                   std::numeric_limits<int32_t>::max(),
                                   std::numeric_limits<int32_t>::min(),
                                   65536,
                                   8192};
      return kEnds[random_() % std::size(kEnds)];
    }
    case 3:
      return static_cast<int64_t>(static_cast<uint64_t>(old) + random_() % 5 - 2);
    case 4:
      return static_cast<int64_t>(static_cast<uint64_t>(old) * 2);
    default:
      return static_cast<int64_t>(random_() % 17);
  }
}

double MessageMutator::Real(double old) {
  constexpr double kReals[] = {0.0,
                               -0.0,
                               1.0,
                               -1.0,
                               0.1,
                               0.5,
                               0.999,
                               1e-12,
                               1e-45,
                               1e38,
                               65536.0,
                               std::numeric_limits<double>::max(),
                               std::numeric_limits<double>::denorm_min(),
                               std::numeric_limits<double>::infinity(),
                               -std::numeric_limits<double>::infinity(),
                               std::numeric_limits<double>::quiet_NaN()};
  switch (random_() % 4) {
    case 0:
      return old * 2;
    case 1:
      return std::ldexp(static_cast<double>(random_()) / 4294967296.0,
                        static_cast<int>(random_() % 64) - 32);
    default:
      return kReals[random_() % std::size(kReals)];
  }
}

std::string MessageMutator::Text(const Field* field, const std::string& old) {
  const std::string& name = field->name();
  const auto pick = [&](const auto& from) -> std::string {
    return from[random_() % std::size(from)];
  };
  const std::string& message = field->containing_type()->name();
  if (!OneIn(6)) {
    if (name == "session_id" || name == "region_id" || name == "context_id") return pick(kIds);
    if (name == "stack" || (name == "name" && message.find("StackRequest") != std::string::npos))
      return pick(kStackNames);
    if (name == "names" || message == "NamedTensor") return pick(kParameters);
    if (name == "name") return pick(kNames);
  }
  std::string value = old;
  value.resize(std::max<size_t>(old.size() + 16, 32));
  value.resize(mutate_bytes_(reinterpret_cast<uint8_t*>(value.data()), old.size(),
                             std::min(value.size(), kMaxBytes)));
  // A `string` that is no UTF-8 never gets past gRPC.
  if (field->type() == Field::TYPE_STRING)
    for (char& c : value) c = static_cast<char>(c & 0x7F);
  return value;
}

void MessageMutator::Cross(Message* message, const Message& other) {
  const std::unique_ptr<Message> copy(other.New());
  copy->CopyFrom(other);
  std::vector<Message*> here, there;
  Collect(message, &here);
  Collect(copy.get(), &there);
  const Message& part = *there[random_() % there.size()];
  std::vector<Message*> same;
  for (Message* m : here)
    if (m->GetDescriptor() == part.GetDescriptor()) same.push_back(m);
  if (!same.empty()) {
    Message* const at = same[random_() % same.size()];
    if (OneIn(2)) at->Clear();
    at->MergeFrom(part);  // of repeated fields: one behind the other
  }
  if (!OneIn(8)) Mend(message);
}

void MessageMutator::Mend(Message* message) {
  uint64_t sequence = 0, id = 0;
  std::vector<Message*> all;
  Collect(message, &all);
  for (Message* m : all) MendOne(m, &sequence, &id);
}

void MessageMutator::MendOne(Message* message, uint64_t* sequence, uint64_t* id) {
  if (OneIn(16)) return;  // a request has several of these, and one at a time shall be wrong
  if (auto* const tensor = dynamic_cast<v1::Tensor*>(message)) {
    const size_t bytes = BytesOf(*tensor);
    if (bytes == 0) return;
    if (tensor->has_slice()) {
      tensor->mutable_slice()->set_size_bytes(bytes);
    } else {
      tensor->mutable_inline_data()->resize(bytes);
    }
    return;
  }
  if (auto* const slice = dynamic_cast<v1::Slice*>(message)) {
    if (slice->offset_bytes() > 65536) slice->set_offset_bytes(slice->offset_bytes() % 65536);
    slice->set_offset_bytes(slice->offset_bytes() & ~uint64_t{3});
  }
  if (auto* const mutation = dynamic_cast<v1::Mutation*>(message))
    mutation->set_sequence(++*sequence);
  if (auto* const request = dynamic_cast<v1::ExecuteRequest*>(message)) request->set_id(++*id);
  if (auto* const request = dynamic_cast<v1::ForwardRequest*>(message)) {
    if (request->has_mutation()) request->mutable_mutation()->set_session_id(request->session_id());
    if (request->output().has_slice())
      request->mutable_output()->mutable_slice()->set_size_bytes(BytesOf(request->input()));
  }
  if (auto* const request = dynamic_cast<v1::BackwardRequest*>(message))
    if (request->input_grad().has_slice())
      request->mutable_input_grad()->mutable_slice()->set_size_bytes(
          BytesOf(request->output_grad()));
  const Descriptor* const type = message->GetDescriptor();
  for (const char* name : {"session_id", "region_id"}) {
    const Field* const field = type->FindFieldByName(name);
    if (field == nullptr || OneIn(16)) continue;
    const std::string value = message->GetReflection()->GetString(*message, field);
    if (value != "other") message->GetReflection()->SetString(message, field, "live");
  }
}

}  // namespace lamina::fuzz
