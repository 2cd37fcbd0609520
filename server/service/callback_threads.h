// gRPC runs callbacks, and so the beginnings of all calls here, on half as many threads as the
// machine has CPUs, two at least, that take turns in watching the connections: whichever hears
// something wakes the next one to watch on before it reads, and each answer wakes it once more. Two
// CPUs pay more for that than a second thread brings: with one, an empty call's round trip takes a
// quarter less there, a Forward's a sixth, an Execute item's a third (docs/performance.md). So do
// few CPUs of a large machine (a container's), whose threads gRPC does not count.
#pragma once

#include <memory>

namespace lamina {

// As gRPC counts them, of the machine's CPUs, those that are not one for two CPUs of this process,
// one at least: how many threads there are too many.
int SpareCallbackThreads(int machine_cpus, int own_cpus);

// Keeps `count` of these threads from their work, for as long as it lives. While it does, gRPC
// servers and callbacks have the others, of which there must be one.
//
// Threads: made and destroyed by one that is none of gRPC's.
class HeldCallbackThreads {
 public:
  // Returns when they are held. The process has a server.
  explicit HeldCallbackThreads(int count);
  ~HeldCallbackThreads();  // before the server shuts down: gRPC ends its threads then
  HeldCallbackThreads(const HeldCallbackThreads&) = delete;
  HeldCallbackThreads& operator=(const HeldCallbackThreads&) = delete;

 private:
  struct State;
  std::shared_ptr<State> state_;  // null: none are held
};

// What this process has too many of.
int SpareCallbackThreads();

}  // namespace lamina
