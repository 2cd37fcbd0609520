#include "server/engine/context_table.h"

#include <iterator>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace lamina {
namespace {

// 0 for what no context was ever called. Only the form that Add gives: no signs, spaces, zeros.
uint64_t Parse(const std::string& id) {
  uint64_t number = 0;
  if (!absl::SimpleAtoi(id, &number) || absl::StrCat(number) != id) return 0;
  return number;
}

}  // namespace

std::string ContextTable::Add(SessionKey session, const std::string& stack,
                              std::unique_ptr<Context> context, const CallSize& size) {
  Record& record = sessions_[session][++last_id_];
  record = Record{stack, std::move(context), size};
  ContextUse& use = uses_[session];
  ++use.contexts;
  use.bytes += record.context->bytes();
  ++live_of_stack_[stack];
  ++live_;
  return absl::StrCat(last_id_);
}

absl::StatusOr<const ContextTable::Record*> ContextTable::Find(SessionKey session,
                                                               const std::string& stack,
                                                               const std::string& id) const {
  if (id.empty())
    return absl::FailedPreconditionError(
        "context_id: is empty; run a training Forward first and give the id it answers with");
  const uint64_t number = Parse(id);
  const auto contexts = sessions_.find(session);
  if (contexts == sessions_.end() && (number == 0 || number > last_id_))
    return absl::FailedPreconditionError(
        "context_id: this session has run no training Forward; Backward needs one first");
  if (contexts != sessions_.end()) {
    const auto record = contexts->second.find(number);
    if (record != contexts->second.end()) {
      if (record->second.stack != stack)
        return absl::InvalidArgumentError(absl::StrCat("stack: is \"", stack,
                                                       "\"; the context belongs to stack \"",
                                                       record->second.stack, "\""));
      if (record->second.context == nullptr)
        return absl::FailedPreconditionError(
            absl::StrCat("context_id: the stack was deleted, and its contexts with it"));
      return &record->second;
    }
  }
  return absl::NotFoundError(
      "context_id: this session has no such context; it may have been spent or released");
}

void ContextTable::Erase(SessionKey session, const std::string& id) {
  std::map<uint64_t, Record>& contexts = sessions_.at(session);
  const auto record = contexts.find(Parse(id));
  --live_of_stack_[record->second.stack];
  --live_;
  Gone(session, *record->second.context);
  contexts.erase(record);  // the session's map stays: that it ran a Forward is known by it
}

void ContextTable::StackDeleted(const std::string& stack) {
  for (auto& [session, contexts] : sessions_) {
    size_t deleted = 0;
    for (auto& [id, record] : contexts) {
      if (record.stack == stack && record.context != nullptr) {
        Gone(session, *record.context);
        record.context.reset();
        --live_;
      }
      if (record.context == nullptr) ++deleted;
    }
    for (auto it = contexts.begin(); deleted > kDeletedKept;) {
      if (it->second.context != nullptr) {
        ++it;
        continue;
      }
      it = contexts.erase(it);
      --deleted;
    }
  }
  live_of_stack_.erase(stack);
}

void ContextTable::SessionEnded(SessionKey session) {
  const auto contexts = sessions_.find(session);
  if (contexts != sessions_.end()) {
    for (auto& [id, record] : contexts->second) {
      if (record.context == nullptr) continue;
      --live_of_stack_[record.stack];
      --live_;
    }
    sessions_.erase(contexts);
    uses_.erase(session);
  }
  if (ended(session)) return;
  SessionKey last = session;
  const auto after = ended_.find(session + 1);
  if (after != ended_.end()) {
    last = after->second;
    ended_.erase(after);
  }
  const auto before = ended_.lower_bound(session);
  if (before != ended_.begin() && std::prev(before)->second + 1 == session) {
    std::prev(before)->second = last;
  } else {
    ended_.emplace(session, last);
  }
}

void ContextTable::Gone(SessionKey session, const Context& context) {
  ContextUse& use = uses_[session];
  --use.contexts;
  use.bytes -= context.bytes();
}

ContextUse ContextTable::use(SessionKey session) const {
  const auto it = uses_.find(session);
  return it == uses_.end() ? ContextUse{} : it->second;
}

bool ContextTable::ended(SessionKey session) const {
  const auto after = ended_.upper_bound(session);
  return after != ended_.begin() && session <= std::prev(after)->second;
}

int64_t ContextTable::live(const std::string& stack) const {
  const auto it = live_of_stack_.find(stack);
  return it == live_of_stack_.end() ? 0 : it->second;
}

}  // namespace lamina
