package lamina

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// requestError is a call's error, with the id that the daemon gave the call.
type requestError struct {
	error
	id string
}

func (e *requestError) Unwrap() error              { return e.error }
func (e *requestError) GRPCStatus() *status.Status { return status.Convert(e.error) }

// RequestID is the id by which the daemon's log calls the call that ended with this error; "" where the daemon never
// heard of it. Where the daemon did not let the caller in, the id is in the message instead.
func RequestID(err error) string {
	var failed *requestError
	if errors.As(err, &failed) {
		return failed.id
	}
	return ""
}

// withRequestID has errors carry their calls' ids, which come behind them in the metadata.
func withRequestID(ctx context.Context, method string, in, out interface{}, connection *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	var trailer metadata.MD
	err := invoke(ctx, method, in, out, connection, append(options, grpc.Trailer(&trailer))...)
	if id := trailer.Get("x-request-id"); err != nil && len(id) > 0 {
		return &requestError{err, id[0]}
	}
	return err
}
