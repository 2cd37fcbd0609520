// philox.h: the generator against its authors' known answers, and the masks' statistics.
#include "lamina/kernels/philox.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "ref/ops.h"

namespace lamina {
namespace {

using ref::DropoutFactors;
using ref::Mask;
using ref::Vec;

struct KnownAnswer {
  uint32_t counter[4], key[2], after_7_rounds[4], after_10_rounds[4];
};

// From the table of known answers that comes with Random123 (Salmon et al., SC'11).
constexpr KnownAnswer kKnownAnswers[] = {
    {{0, 0, 0, 0},
     {0, 0},
     {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48},
     {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

TEST(Philox, GivesTheKnownAnswers) {
  for (const KnownAnswer& known : kKnownAnswers) {
    const Philox4 seven = Philox4x32<7>(known.counter, known.key[0], known.key[1]);
    const Philox4 ten = Philox4x32<10>(known.counter, known.key[0], known.key[1]);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(seven.word[i], known.after_7_rounds[i]) << "word " << i;
      EXPECT_EQ(ten.word[i], known.after_10_rounds[i]) << "word " << i;
    }
  }
}

TEST(Philox, LanesAreTheHalvesOfTheWordsInOrder) {
  const Philox4 bits{{0x00020001u, 0x00040003u, 0x00060005u, 0x00080007u}};
  for (uint32_t i = 0; i < 8; ++i) EXPECT_EQ(DropoutLane(bits, i), i + 1);
}

// Every column of a row: its own byte of its call, above the exclusive or of the four in its place.
TEST(Philox, DrawsAreMadeOfTheCallsBytes) {
  const RngState rng{77, 5};
  const uint32_t stream = DropoutStream(1, DropoutSite::kAttentionProbs);
  for (uint32_t column = 0; column < 256; ++column) {
    const uint32_t call = column / 64 * 4 + column % 32 / 8;
    const Philox4 bytes = DropoutBytes(rng, stream, 9, call);
    const uint32_t i = column % 64 / 32 * 8 + column % 8;  // of the call's 16
    const auto byte = [&](uint32_t word) { return (bytes.word[word] >> (i % 4 * 8)) & 0xFFu; };
    const uint32_t draw = byte(i / 4) << 8 | (byte(0) ^ byte(1) ^ byte(2) ^ byte(3));
    EXPECT_EQ(DropoutLane(DropoutBits(rng, stream, 9, column / 8), column % 8), draw) << column;
  }
}

TEST(Philox, ThresholdRoundsAndNeverDropsEverything) {
  EXPECT_EQ(KeepThreshold(0.0f), 65536u);
  EXPECT_EQ(KeepThreshold(0.5f), 32768u);
  EXPECT_EQ(KeepThreshold(0.1f), 58982u);  // 58982.4
  EXPECT_EQ(KeepThreshold(0.999f), 66u);   // 65.5
  EXPECT_EQ(KeepThreshold(std::nextafter(1.0f, 0.0f)), 1u);
  EXPECT_EQ(KeepThreshold(1e-6f), 65536u);
  for (float p : {0.0f, 0.1f, 0.5f, 0.999f}) {
    const uint32_t threshold = KeepThreshold(p);
    EXPECT_NEAR(KeepScale(threshold) * threshold / 65536.0, 1.0, 1e-7) << p;
  }
}

// No part of the state is left out of the counter and the key: a change of any gives other bits.
TEST(Philox, EveryPartOfTheStateCounts) {
  const RngState rng{0x0123456789abcdefu, 42};
  const uint32_t stream = DropoutStream(3, DropoutSite::kFeedForward);
  std::vector<std::pair<const char*, Philox4>> all = {
      {"base", DropoutBits(rng, stream, 7, 5)},
      {"low seed", DropoutBits({rng.seed + 1, rng.counter}, stream, 7, 5)},
      {"high seed", DropoutBits({rng.seed + (uint64_t{1} << 40), rng.counter}, stream, 7, 5)},
      {"low counter", DropoutBits({rng.seed, rng.counter + 1}, stream, 7, 5)},
      {"high counter", DropoutBits({rng.seed, rng.counter + (uint64_t{1} << 40)}, stream, 7, 5)},
      {"layer", DropoutBits(rng, DropoutStream(4, DropoutSite::kFeedForward), 7, 5)},
      {"site", DropoutBits(rng, DropoutStream(3, DropoutSite::kAttentionOutput), 7, 5)},
      {"row", DropoutBits(rng, stream, 8, 5)},
      {"high row", DropoutBits(rng, stream, 7 + (uint64_t{1} << 33), 5)},
      {"eight", DropoutBits(rng, stream, 7, 6)},
      {"half", DropoutBits(rng, stream, 7, 1)},
      {"block", DropoutBits(rng, stream, 7, 13)},
  };
  for (size_t i = 0; i < all.size(); ++i)
    for (size_t j = i + 1; j < all.size(); ++j)
      for (int word = 0; word < 4; ++word)
        EXPECT_NE(all[i].second.word[word], all[j].second.word[word])
            << all[i].first << " and " << all[j].first;
}

TEST(Philox, StreamsOfALayerDoNotMeetTheNextLayers) {
  std::vector<uint32_t> streams;
  for (uint32_t layer = 0; layer < 4; ++layer)
    for (DropoutSite site :
         {DropoutSite::kAttentionProbs, DropoutSite::kAttentionOutput, DropoutSite::kFeedForward})
      streams.push_back(DropoutStream(layer, site));
  for (size_t i = 0; i < streams.size(); ++i)
    for (size_t j = i + 1; j < streams.size(); ++j) EXPECT_NE(streams[i], streams[j]);
}

// --- statistics, over 2^20 elements; every run draws the same ---

constexpr int64_t kRows = 2048, kCols = 512;
constexpr double kCount = static_cast<double>(kRows * kCols);

Mask MaskAt(float ratio, uint32_t layer = 0, DropoutSite site = DropoutSite::kFeedForward,
            uint64_t counter = 1) {
  return Mask{ratio, RngState{20240229, counter}, DropoutStream(layer, site)};
}

double KeepRate(float ratio) { return KeepThreshold(ratio) / 65536.0; }

TEST(DropoutMask, KeepsAtTheRateOfItsThreshold) {
  for (float ratio : {0.05f, 0.1f, 0.5f, 0.9f, 0.999f}) {
    double kept = 0;
    for (double f : DropoutFactors(MaskAt(ratio), kRows, kCols)) kept += f != 0.0 ? 1 : 0;
    const double rate = KeepRate(ratio);
    const double deviation = std::sqrt(kCount * rate * (1 - rate));
    EXPECT_NEAR(kept, kCount * rate, 4.5 * deviation) << "p = " << ratio;
    // And the rate is the one asked for, to half a step of 2^-16.
    EXPECT_NEAR(rate, 1.0 - static_cast<double>(ratio), 0.5 / 65536 + 1e-7);
  }
}

TEST(DropoutMask, KeepsTheMean) {
  for (float ratio : {0.1f, 0.5f, 0.999f}) {
    const double rate = KeepRate(ratio);
    double sum = 0;
    for (double f : DropoutFactors(MaskAt(ratio), kRows, kCols)) {
      sum += f;
      if (f != 0.0) {
        ASSERT_DOUBLE_EQ(f * rate, 1.0);
      }
    }
    // A factor is 1/rate with probability rate: its variance is (1 - rate) / rate.
    EXPECT_NEAR(sum / kCount, 1.0, 4.5 * std::sqrt((1 - rate) / rate / kCount)) << "p = " << ratio;
  }
}

TEST(DropoutMask, EveryLaneKeepsAtTheSameRate) {
  const Vec factors = DropoutFactors(MaskAt(0.1f), kRows, kCols);
  double kept[64] = {};
  for (size_t i = 0; i < factors.size(); ++i) kept[i % 64] += factors[i] != 0.0 ? 1 : 0;
  const double rate = KeepRate(0.1f), count = kCount / 64;
  for (int lane = 0; lane < 64; ++lane)
    EXPECT_NEAR(kept[lane], count * rate, 4.5 * std::sqrt(count * rate * (1 - rate)))
        << "lane " << lane;
}

// How many of the elements, shifted against each other by `shift`, are kept in both.
double KeptInBoth(const Vec& a, const Vec& b, size_t shift, double* pairs) {
  double both = 0;
  for (size_t i = 0; i + shift < a.size(); ++i) both += a[i] != 0.0 && b[i + shift] != 0.0 ? 1 : 0;
  *pairs = static_cast<double>(a.size() - shift);
  return both;
}

void ExpectIndependent(const char* what, const Vec& a, const Vec& b, size_t shift, double rate) {
  double pairs = 0;
  const double both = KeptInBoth(a, b, shift, &pairs);
  const double expected = rate * rate;
  EXPECT_NEAR(both, pairs * expected, 4.5 * std::sqrt(pairs * expected * (1 - expected))) << what;
}

TEST(DropoutMask, NeighboursAreIndependent) {
  for (float ratio : {0.1f, 0.5f}) {
    const Vec factors = DropoutFactors(MaskAt(ratio), kRows, kCols);
    const double rate = KeepRate(ratio);
    for (size_t shift : {1, 2, 3, 4, 7, 8, 16, 32, 36, 64})
      ExpectIndependent("columns", factors, factors, shift, rate);
    for (size_t rows : {1, 2, 8}) ExpectIndependent("rows", factors, factors, rows * kCols, rate);
  }
}

TEST(DropoutMask, LayersSitesAndStepsAreIndependent) {
  const float ratio = 0.5f;
  const Vec base = DropoutFactors(MaskAt(ratio), kRows, kCols);
  const double rate = KeepRate(ratio);
  ExpectIndependent("layers", base, DropoutFactors(MaskAt(ratio, 1), kRows, kCols), 0, rate);
  ExpectIndependent("sites", base,
                    DropoutFactors(MaskAt(ratio, 0, DropoutSite::kAttentionOutput), kRows, kCols),
                    0, rate);
  ExpectIndependent("steps", base,
                    DropoutFactors(MaskAt(ratio, 0, DropoutSite::kFeedForward, 2), kRows, kCols), 0,
                    rate);
}

// What makes a mask free of tile shapes: an element's bits do not depend on the matrix around it.
TEST(DropoutMask, AnElementsBitsDependOnItsIndexAlone) {
  const Vec wide = DropoutFactors(MaskAt(0.3f), 9, 37);
  const Vec narrow = DropoutFactors(MaskAt(0.3f), 5, 19);
  for (size_t r = 0; r < 5; ++r)
    for (size_t c = 0; c < 19; ++c) EXPECT_EQ(wide[r * 37 + c], narrow[r * 19 + c]);
}

}  // namespace
}  // namespace lamina
