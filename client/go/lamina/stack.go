package lamina

import (
	"context"

	pb "lamina.dev/lamina/v1"
)

// Stack is a stack of the daemon's as one session drives it.
type Stack struct {
	session *Session
	name    string
}

// CreateStack makes a stack, draws its weights, and returns a handle. It lives in the daemon until DeleteStack, also
// when this session is over.
//
// InvalidArgument: the name, or a field of the config, with its value and range. AlreadyExists: the name.
// ResourceExhausted: the plan does not fit, with the numbers.
func (s *Session) CreateStack(name string, config *pb.StackConfig) (*Stack, error) {
	err := s.once(func(ctx context.Context) error {
		_, err := s.client.config.CreateStack(ctx, &pb.CreateStackRequest{Name: name, Config: config})
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Stack{session: s, name: name}, nil
}

// OpenStack is a handle of a stack that is there. NotFound.
func (s *Session) OpenStack(name string) (*Stack, error) {
	err := s.retry(func(ctx context.Context) error {
		_, err := s.client.config.GetStack(ctx, &pb.GetStackRequest{Name: name})
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Stack{session: s, name: name}, nil
}

// DeleteStack frees a stack with its weights and contexts. It needs no session. NotFound.
func (c *Client) DeleteStack(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	_, err := c.config.DeleteStack(ctx, &pb.DeleteStackRequest{Name: name})
	return err
}

// Forward runs all layers over x [B, S, H] in training and writes y, shaped like it. It returns the context that
// Backward spends. ResourceExhausted: no room for the context.
func (k *Stack) Forward(x, y *Tensor) (contextID string, err error) {
	request := &pb.ForwardRequest{
		Stack: k.name, SessionId: k.session.id, Training: new(bool), Input: x.message(), Output: y.target()}
	*request.Training = true
	var answer *pb.ForwardResponse
	err = k.session.mutate(func(ctx context.Context, mutation *pb.Mutation) (err error) {
		request.Mutation = mutation
		answer, err = k.session.client.layers.Forward(ctx, request)
		return err
	})
	if err != nil {
		return "", err
	}
	return answer.ContextId, y.take(answer.Output)
}

// Backward adds a context's gradients to the stack's, given dy, the gradient of the loss by that Forward's y. dx, where
// not nil, gets the gradient by its x.
func (k *Stack) Backward(contextID string, dy, dx *Tensor) error {
	request := &pb.BackwardRequest{Stack: k.name, ContextId: contextID, OutputGrad: dy.message()}
	if dx != nil {
		request.InputGrad = dx.target()
	}
	var answer *pb.BackwardResponse
	err := k.session.mutate(func(ctx context.Context, mutation *pb.Mutation) (err error) {
		request.Mutation = mutation
		answer, err = k.session.client.layers.Backward(ctx, request)
		return err
	})
	if err != nil || dx == nil {
		return err
	}
	return dx.take(answer.InputGrad)
}

// ApplyGradients makes one optimizer step with the request's settings; its Stack and Mutation are filled in here.
func (k *Stack) ApplyGradients(settings *pb.ApplyGradientsRequest) (*pb.ApplyGradientsResponse, error) {
	settings.Stack = k.name
	var answer *pb.ApplyGradientsResponse
	err := k.session.mutate(func(ctx context.Context, mutation *pb.Mutation) (err error) {
		settings.Mutation = mutation
		answer, err = k.session.client.layers.ApplyGradients(ctx, settings)
		return err
	})
	return answer, err
}
