// Replays the corpus: every file through its target's entry, as libFuzzer calls it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "tests/fuzz/daemon.h"
#include "tests/fuzz/message_mutator.h"
#include "tests/fuzz/target.h"

namespace lamina::fuzz {

void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

namespace {

std::vector<std::filesystem::path> CorpusOf(const std::string& target) {
  std::vector<std::filesystem::path> files;
  const std::filesystem::path folder = std::filesystem::path(LAMINA_FUZZ_CORPUS) / target;
  if (std::filesystem::is_directory(folder))
    for (const auto& entry : std::filesystem::directory_iterator(folder))
      files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  return files;
}

std::string Read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

class Replay : public ::testing::TestWithParam<Target> {};

TEST_P(Replay, Corpus) {
  const std::vector<std::filesystem::path> files = CorpusOf(GetParam().name);
  EXPECT_THAT(files, ::testing::Not(::testing::IsEmpty()));
  const int64_t ok_before = Daemon::Get().answered_ok();
  for (const std::filesystem::path& path : files) {
    SCOPED_TRACE(path.string());
    const std::string input = Read(path);
    // A file that is no message any more tests nothing: the contract has changed under it.
    if (GetParam().form != nullptr) {
      const std::unique_ptr<google::protobuf::Message> message(GetParam().form->New());
      EXPECT_TRUE(ParseText(input, message.get())) << "is no " << GetParam().form->GetTypeName();
    }
    GetParam().run(input);
  }
  // Inputs that are all refused would reach little of what is behind the handlers.
  if (GetParam().form != nullptr) {
    EXPECT_GT(Daemon::Get().answered_ok(), ok_before);
  }
}

INSTANTIATE_TEST_SUITE_P(Fuzz, Replay, ::testing::ValuesIn(Targets()),
                         [](const auto& target) { return target.param.name; });

// A target that was renamed would leave its corpus behind.
TEST(ReplayTest, EveryFolderOfTheCorpusIsATargets) {
  std::vector<std::string> names, folders;
  for (const Target& target : Targets()) names.push_back(target.name);
  for (const auto& entry : std::filesystem::directory_iterator(LAMINA_FUZZ_CORPUS))
    folders.push_back(entry.path().filename().string());
  EXPECT_THAT(folders, ::testing::UnorderedElementsAreArray(names));
}

}  // namespace
}  // namespace lamina::fuzz
