// Package lamina is a client of laminad: connect, open a session, train a stack.
//
//	client, err := lamina.Connect("")  // LAMINA_TARGET, or the daemon's usual socket
//	session, err := client.OpenSession(ctx, lamina.SessionOptions{Name: "me"})
//	stack, err := session.CreateStack("demo", &pb.StackConfig{BatchSize: 8, MaxSeqLength: 128, ...})
//	x, err := session.NewTensor(8, 128, 256)  // in memory that the daemon maps too
//	context, err := stack.Forward(x, y)
//
// It is an example to read and to begin from: training steps of fp32 stacks, each exactly once. What else the
// daemon does is in the generated package lamina.dev/lamina/v1, which works beside it.
//
// Errors are gRPC statuses with the daemon's own message: status.Code(err) says which, and RequestID(err) by what id the
// daemon's log calls the call.
package lamina

import (
	"fmt"
	"math"
	"os"

	"google.golang.org/grpc"

	pb "lamina.dev/lamina/v1"
)

// Client is a connection to one daemon. Threads: any.
type Client struct {
	connection *grpc.ClientConn
	config     pb.ConfigServiceClient
	layers     pb.LayerServiceClient
	sessions   pb.SessionServiceClient
}

// DefaultTarget is LAMINA_TARGET, or the socket where laminad listens by default.
func DefaultTarget() string {
	if target := os.Getenv("LAMINA_TARGET"); target != "" {
		return target
	}
	if os.Geteuid() == 0 {
		return "unix:/run/lamina/laminad.sock"
	}
	if folder := os.Getenv("XDG_RUNTIME_DIR"); folder != "" {
		return "unix:" + folder + "/lamina/laminad.sock"
	}
	return fmt.Sprintf("unix:/tmp/lamina-%d/laminad.sock", os.Geteuid())
}

// Connect makes a client of the daemon at target, "unix:PATH" or "HOST:PORT"; "" is DefaultTarget. Over TCP the
// environment says how they know each other: SecurityFromEnvironment. Nothing is sent yet: whether a daemon is there
// shows with the first call.
func Connect(target string) (*Client, error) {
	return ConnectSecurely(target, SecurityFromEnvironment())
}

// ConnectSecurely is Connect with the given Security.
func ConnectSecurely(target string, security Security) (*Client, error) {
	if target == "" {
		target = DefaultTarget()
	}
	options, err := security.options(target)
	if err != nil {
		return nil, err
	}
	// The daemon's inline cap says how large a message may be; gRPC's own 4 MiB would be below it.
	connection, err := grpc.Dial(target, append(options, grpc.WithUnaryInterceptor(withRequestID), grpc.WithDefaultCallOptions(
		grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)))...)
	if err != nil {
		return nil, err
	}
	return &Client{
		connection: connection,
		config:     pb.NewConfigServiceClient(connection),
		layers:     pb.NewLayerServiceClient(connection),
		sessions:   pb.NewSessionServiceClient(connection),
	}, nil
}

// Close ends the connection, and with it the client's sessions.
func (c *Client) Close() error { return c.connection.Close() }
