package lamina

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "lamina.dev/lamina/v1"
)

// The tests need a daemon, LAMINA_TARGET's: scripts/go-client test lamina.dev/lamina. tests/clients runs them.
func open(t *testing.T, transport string) *Session {
	t.Helper()
	if os.Getenv("LAMINA_TARGET") == "" {
		t.Skip("LAMINA_TARGET names no daemon")
	}
	client, err := Connect("")
	check(t, err)
	session, err := client.OpenSession(context.Background(), SessionOptions{Name: "go test", Transport: transport})
	check(t, err)
	t.Cleanup(func() {
		session.Close()
		client.Close()
	})
	return session
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func refused(t *testing.T, err error, code codes.Code, words string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), words) {
		t.Fatalf("got %v, want %s with %q", err, code, words)
	}
}

func newStack(t *testing.T, session *Session) *Stack {
	t.Helper()
	name, seed := fmt.Sprintf("go-test-%d", time.Now().UnixNano()), int64(3)
	stack, err := session.CreateStack(name, &pb.StackConfig{
		BatchSize: 2, MaxSeqLength: 8, HiddenSize: 16, Heads: 2, NumHiddenLayers: 2, HiddenDropoutRatio: 0.1, Seed: &seed})
	check(t, err)
	t.Cleanup(func() {
		check(t, session.client.DeleteStack(name))
	})
	return stack
}

func tensor(t *testing.T, session *Session) *Tensor {
	t.Helper()
	made, err := session.NewTensor(2, 8, 16)
	check(t, err)
	for i := range made.Values {
		made.Values[i] = float32(i%7) - 3
	}
	return made
}

// step trains one step, with y as its own gradient; it returns the gradients' norm and the gradient by x.
func step(t *testing.T, session *Session, stack *Stack) (float64, []float32) {
	t.Helper()
	x, y, dx := tensor(t, session), tensor(t, session), tensor(t, session)
	saved, err := stack.Forward(x, y)
	check(t, err)
	check(t, stack.Backward(saved, y, dx))
	applied, err := stack.ApplyGradients(&pb.ApplyGradientsRequest{LearningRate: 1e-2, ZeroGradients: true})
	check(t, err)
	if !applied.Applied || applied.Step != 1 {
		t.Fatalf("applied: %v", applied)
	}
	return applied.GradNorm, dx.Values
}

// losing runs every call, but the caller hears `code` instead of those answers that it is to lose.
type losing struct {
	grpc.ClientConnInterface
	code  codes.Code
	loses func(call int) bool // of the calls' numbers, from 1
	calls int
}

func (l *losing) Invoke(ctx context.Context, method string, in, out interface{}, options ...grpc.CallOption) error {
	err := l.ClientConnInterface.Invoke(ctx, method, in, out, options...)
	l.calls++
	if l.loses(l.calls) {
		return status.Error(l.code, "the answer was lost")
	}
	return err
}

func lose(session *Session, code codes.Code, loses func(call int) bool) *losing {
	l := &losing{ClientConnInterface: session.client.connection, code: code, loses: loses}
	session.client.layers = pb.NewLayerServiceClient(l)
	return l
}

func TestBothTransportsGiveTheSame(t *testing.T) {
	regions, inline := open(t, "memfd"), open(t, "inline")
	norm, dx := step(t, regions, newStack(t, regions))
	inlineNorm, inlineDx := step(t, inline, newStack(t, inline))
	if norm != inlineNorm || norm == 0 {
		t.Fatalf("norms: %v and %v", norm, inlineNorm)
	}
	for i := range dx {
		if dx[i] != inlineDx[i] {
			t.Fatalf("dx[%d]: %v and %v", i, dx[i], inlineDx[i])
		}
	}
}

func TestARepeatedCallRunsOnce(t *testing.T) {
	session := open(t, "")
	norm, _ := step(t, session, newStack(t, session))
	for _, code := range []codes.Code{codes.Unavailable, codes.DeadlineExceeded} {
		l := lose(session, code, func(call int) bool { return call%2 == 1 })
		again, _ := step(t, session, newStack(t, session))
		if again != norm || l.calls != 6 {
			t.Fatalf("%s: %d calls, norm %v, not %v", code, l.calls, again, norm)
		}
	}
}

func TestAnAnswerThatStaysLostEndsMutations(t *testing.T) {
	session := open(t, "")
	stack := newStack(t, session)
	l := lose(session, codes.Unavailable, func(int) bool { return true })
	x := tensor(t, session)
	_, err := stack.Forward(x, tensor(t, session))
	refused(t, err, codes.Unavailable, "the answer was lost")
	if l.calls != attempts {
		t.Fatalf("%d calls", l.calls)
	}
	_, err = stack.ApplyGradients(&pb.ApplyGradientsRequest{LearningRate: 1})
	refused(t, err, codes.FailedPrecondition, "open a new session")
	if l.calls != attempts {
		t.Fatal("a mutation followed")
	}
}

func TestARefusedCallUsesNoSequence(t *testing.T) {
	session := open(t, "")
	stack := newStack(t, session)
	refused(t, stack.Backward("none", tensor(t, session), nil), codes.FailedPrecondition, "context_id")
	step(t, session, stack)
}

func TestTensors(t *testing.T) {
	session := open(t, "memfd")
	for _, shape := range [][]int64{{0}, {2, -1}, {1 << 20, 1 << 20}} {
		_, err := session.NewTensor(shape...)
		refused(t, err, codes.InvalidArgument, "shape")
	}
	made := tensor(t, session)
	regions := func() int {
		listed, err := session.client.sessions.ListRegions(context.Background(), &pb.ListRegionsRequest{SessionId: session.id})
		check(t, err)
		return len(listed.Regions)
	}
	if regions() != 1 {
		t.Fatalf("%d regions", regions())
	}
	made.Free()
	made.Free()
	if regions() != 0 || made.Values != nil {
		t.Fatalf("%d regions", regions())
	}
}

func TestStacksByName(t *testing.T) {
	session := open(t, "")
	stack := newStack(t, session)
	same, err := session.OpenStack(stack.name)
	check(t, err)
	step(t, session, same)
	_, err = session.OpenStack("none")
	refused(t, err, codes.NotFound, "none")
	_, err = session.CreateStack("a b", &pb.StackConfig{})
	refused(t, err, codes.InvalidArgument, "name")
	refused(t, session.client.DeleteStack("none"), codes.NotFound, "none")
}

func TestTheEndOfASessionShows(t *testing.T) {
	session := open(t, "")
	stack := newStack(t, session)
	x, y := tensor(t, session), tensor(t, session)
	_, err := session.client.sessions.DeleteSession(context.Background(), &pb.DeleteSessionRequest{SessionId: session.id})
	check(t, err)
	for wait := 0; session.Over() == "" && wait < 1000; wait++ {
		time.Sleep(10 * time.Millisecond)
	}
	_, err = stack.Forward(x, y)
	refused(t, err, codes.Unavailable, "this session has ended")
	_, err = session.NewTensor(1)
	refused(t, err, codes.Unavailable, "this session has ended")
}

func TestAnUnknownTransport(t *testing.T) {
	client, err := Connect("unix:/none")
	check(t, err)
	defer client.Close()
	_, err = client.OpenSession(context.Background(), SessionOptions{Transport: "posix"})
	refused(t, err, codes.InvalidArgument, "posix")
}
