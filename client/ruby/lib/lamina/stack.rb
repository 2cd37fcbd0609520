module Lamina
  # A stack of the daemon's as one session drives it. Made by Session#create_stack and Session#stack.
  class Stack
    attr_reader :name

    def initialize(session, name)
      @session = session
      @layers = session.client.layers
      @name = name
    end

    # Runs all layers over x [B, S, H] in training and writes y, shaped like it. Returns the context id that backward
    # spends. GRPC::ResourceExhausted: no room for the context.
    def forward(x, y)
      request = V1::ForwardRequest.new(
        stack: @name, session_id: @session.id, training: true, input: x.message, output: y.target
      )
      answer = @session.mutate do |mutation, deadline|
        request.mutation = mutation
        @layers.forward(request, deadline: deadline)
      end
      y.take(answer.output)
      answer.context_id
    end

    # Adds a context's gradients to the stack's, given dy, the gradient of the loss by that forward's y. dx, where
    # given, gets the gradient by its x.
    def backward(context_id, dy, dx = nil)
      request = V1::BackwardRequest.new(
        stack: @name, context_id: context_id, output_grad: dy.message, input_grad: dx&.target
      )
      answer = @session.mutate do |mutation, deadline|
        request.mutation = mutation
        @layers.backward(request, deadline: deadline)
      end
      dx&.take(answer.input_grad)
    end

    # One optimizer step, with ApplyGradientsRequest's fields. Returns the ApplyGradientsResponse.
    def apply_gradients(**settings)
      request = V1::ApplyGradientsRequest.new(stack: @name, **settings)
      @session.mutate do |mutation, deadline|
        request.mutation = mutation
        @layers.apply_gradients(request, deadline: deadline)
      end
    end
  end
end
