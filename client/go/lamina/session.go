package lamina

import (
	"context"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "lamina.dev/lamina/v1"
)

const (
	attempts    = 6                     // of a call that is not answered
	firstWait   = 50 * time.Millisecond // before the second one; then twice as long each time
	callTimeout = 60 * time.Second      // of one attempt
	farewell    = 2 * time.Second       // for ending a session: its lease ends it anyway
)

// SessionOptions say how a session is to be. The zero value will do.
type SessionOptions struct {
	// Name is for people who read the daemon's log; at most 64 printable characters.
	Name string
	// Transport is "memfd" or "inline" to insist, or "" (or "auto") for memfd where it works, else inline.
	Transport string
}

// Session is this client's lease on the daemon: its regions, contexts and the numbers of its mutations live and die
// with it. Threads: any; mutations run one after another.
type Session struct {
	client     *Client
	id         string
	lease      time.Duration
	brokerPath string
	inline     string // why tensors go inside messages; "" where they lie in regions

	alive context.Context // done once the session is over: ends every call that waits
	stop  context.CancelFunc

	mutations sync.Mutex // held by the mutation that runs
	sequence  uint64     // of the last mutation that was answered
	unsure    error      // why nobody knows whether the next one was used; nil: it was not

	mutex sync.Mutex
	over  string // why the session is over; "" while it lives
}

// OpenSession opens a session and holds its lease until Close, or until ctx is done.
//
// Unavailable: no daemon, one that drains, or, where memfd is insisted on, no way to its broker socket.
// ResourceExhausted: the daemon's cap on sessions. InvalidArgument: an option.
func (c *Client) OpenSession(ctx context.Context, options SessionOptions) (*Session, error) {
	switch options.Transport {
	case "", "auto", "memfd", "inline":
	default:
		return nil, status.Errorf(codes.InvalidArgument, "transport %q must be auto, memfd or inline", options.Transport)
	}
	s := &Session{client: c}
	s.alive, s.stop = context.WithCancel(ctx)
	// A session whose answer was lost ends by itself: nothing holds its lease.
	var opened *pb.CreateSessionResponse
	err := s.retry(func(ctx context.Context) (err error) {
		opened, err = c.sessions.CreateSession(ctx, &pb.CreateSessionRequest{ClientName: options.Name})
		return err
	})
	if err != nil {
		s.stop()
		return nil, err
	}
	s.id = opened.SessionId
	s.lease = time.Duration(opened.LeaseSeconds * float64(time.Second))
	s.brokerPath = opened.BrokerPath
	if err := s.holdLease(); err != nil {
		s.stop()
		return nil, err
	}
	if options.Transport == "inline" {
		s.inline = "as asked"
	} else if err := s.tryRegion(); err != nil {
		if options.Transport == "memfd" {
			s.Close()
			return nil, err
		}
		s.inline = status.Convert(err).Message()
	}
	return s, nil
}

// holdLease opens the KeepAlive stream, waits until the daemon has bound the session to it, and from then on sends a
// message three times a lease. The stream's end is the session's.
func (s *Session) holdLease() error {
	unbound := time.AfterFunc(callTimeout, s.stop)
	defer unbound.Stop()
	stream, err := s.client.sessions.KeepAlive(s.alive)
	if err != nil {
		return err
	}
	// Whether a message could be sent shows in Recv, which says why.
	stream.Send(&pb.KeepAliveRequest{SessionId: s.id})
	if _, err := stream.Recv(); err != nil {
		return err
	}
	go func() {
		for {
			_, err := stream.Recv()
			if err == io.EOF {
				s.end("it was deleted")
				return
			}
			if err != nil {
				s.end(status.Convert(err).Message())
				return
			}
		}
	}()
	go func() {
		beat := time.NewTicker(s.lease / 3)
		defer beat.Stop()
		for {
			select {
			case <-beat.C:
				stream.Send(&pb.KeepAliveRequest{})
			case <-s.alive.Done():
				stream.CloseSend()
				return
			}
		}
	}()
	return nil
}

// end notes why the session is over, once, and ends the calls that wait.
func (s *Session) end(reason string) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.over == "" {
		s.over = reason
	}
	s.stop()
}

// Over says why the session has ended; "" while it lives. Regions and contexts are gone then, stacks and their weights
// are the daemon's and still there: open a new session.
func (s *Session) Over() string {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.over
}

// Transport is "memfd" or "inline", and why in the latter case.
func (s *Session) Transport() (name, reason string) {
	if s.inline != "" {
		return "inline", s.inline
	}
	return "memfd", ""
}

// Close ends the session in the daemon, which frees its contexts and regions. Tensors stay readable. Idempotent.
func (s *Session) Close() {
	if s.alive.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	s.client.sessions.DeleteSession(ctx, &pb.DeleteSessionRequest{SessionId: s.id})
	s.end("closed")
}

// once runs a call that may not be repeated.
func (s *Session) once(call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(s.alive, callTimeout)
	defer cancel()
	err := call(ctx)
	if reason := s.Over(); err != nil && reason != "" {
		return status.Errorf(codes.Unavailable, "this session has ended (%s): its regions and contexts are gone", reason)
	}
	return err
}

// retry runs a call that may be repeated, again while it is not answered.
func (s *Session) retry(call func(context.Context) error) error {
	wait := firstWait
	for attempt := 1; ; attempt++ {
		err := s.once(call)
		if !unanswered(err) || attempt == attempts || s.alive.Err() != nil {
			return err
		}
		time.Sleep(wait)
		wait *= 2
	}
}

// unanswered: the daemon may have run the call, or not. After every other error it has changed nothing.
func unanswered(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unknown:
		return true
	}
	return false
}

// mutate runs a mutation exactly once. A repeat after a lost answer carries the same sequence and the same body, so
// the daemon gives the first run's answer instead of running again. A call that the daemon refused has not used its
// sequence up. Where no repeat was answered either, nobody knows whether the sequence was used, and this simple client
// lets no more mutations follow.
func (s *Session) mutate(call func(context.Context, *pb.Mutation) error) error {
	s.mutations.Lock()
	defer s.mutations.Unlock()
	if s.unsure != nil {
		return s.unsure
	}
	mutation := &pb.Mutation{SessionId: s.id, Sequence: s.sequence + 1}
	err := s.retry(func(ctx context.Context) error { return call(ctx, mutation) })
	if err == nil {
		s.sequence++
	} else if unanswered(err) && s.Over() == "" {
		s.unsure = status.Errorf(codes.FailedPrecondition,
			"an earlier call was never answered, so it may have run or not (%s): open a new session",
			status.Convert(err).Message())
	}
	return err
}
