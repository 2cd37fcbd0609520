#include <lamina/client.h>

#include <cmath>
#include <cstdio>

using namespace lamina::client;

int main() {
  Client client = Client::Connect().value();  // LAMINA_TARGET, or the daemon's usual socket
  Session session = client.OpenSession().value();
  StackConfig config{.batch_size = 4, .max_seq_length = 64, .hidden_size = 128, .heads = 4};
  config.num_hidden_layers = 2;
  Stack stack = session.CreateStack("example", config).value();
  Tensor x = session.NewTensor(DType::kFloat32, {4, 64, 128}).value();  // shared with the daemon
  Tensor y = session.NewTensor(DType::kFloat32, x.shape()).value();
  for (size_t i = 0; i < x.size(); ++i) x.floats()[i] = std::sin(0.1f * static_cast<float>(i));
  for (int step = 0; step < 20; ++step) {
    ForwardResult forward = stack.Forward(x, {.output = y}).value();
    float loss = 0;  // the mean of y squared; its gradient by y takes y's place
    for (float& v : y.floats()) loss += v * v / y.size(), v *= 2.0f / y.size();
    stack.Backward(forward.context, y).value();
    stack.ApplyGradients({.learning_rate = 1e-3, .zero_gradients = true}).value();
    std::printf("step %2d  loss %.4f\n", step, loss);
  }
  return client.DeleteStack("example").ok() ? 0 : 1;
}
