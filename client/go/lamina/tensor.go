package lamina

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"net"
	"syscall"
	"time"
	"unsafe"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "lamina.dev/lamina/v1"
)

// Tensor is a row-major array of fp32 values: in a region that this process and the daemon map, or, where the session
// is inline, in memory of this process, and copied into each message.
type Tensor struct {
	// Values may be read and written while no call uses them. Not after Free.
	Values []float32
	// Shape: extents, outermost first; each >= 1, at most four.
	Shape []int64

	session *Session
	slice   *pb.Slice // where in which region; nil: inline
	memory  []byte    // the whole region
}

// NewTensor makes a zeroed tensor, in a region of its own where the session has regions.
//
// InvalidArgument: the shape. ResourceExhausted: the session's cap on regions, with the numbers.
func (s *Session) NewTensor(shape ...int64) (*Tensor, error) {
	count := int64(1)
	for _, extent := range shape {
		if extent < 1 || count > math.MaxInt32/extent {
			return nil, status.Errorf(codes.InvalidArgument, "shape %v: extents must be 1 or more, their product 2^31 - 1 at most", shape)
		}
		count *= extent
	}
	if s.inline != "" {
		return &Tensor{Values: make([]float32, count), Shape: shape, session: s}, nil
	}
	id, memory, err := s.newRegion(uint64(4 * count))
	if err != nil {
		return nil, err
	}
	// The daemon is on this machine, so its byte order is ours.
	values := unsafe.Slice((*float32)(unsafe.Pointer(&memory[0])), count)
	slice := &pb.Slice{RegionId: id, OffsetBytes: 0, SizeBytes: uint64(4 * count)}
	return &Tensor{Values: values, Shape: shape, session: s, slice: slice, memory: memory}, nil
}

// Free gives the tensor's memory back. Values is nil from then on.
func (t *Tensor) Free() {
	t.Values = nil
	if t.memory != nil {
		syscall.Munmap(t.memory)
		t.memory = nil
		t.session.releaseRegion(t.slice.RegionId)
	}
}

// message is what a request says of the tensor.
func (t *Tensor) message() *pb.Tensor {
	m := &pb.Tensor{Dtype: pb.DataType_DATA_TYPE_FLOAT32, Shape: t.Shape}
	if t.slice != nil {
		m.Storage = &pb.Tensor_Slice{Slice: t.slice}
		return m
	}
	bytes := make([]byte, 4*len(t.Values))
	for i, v := range t.Values {
		binary.LittleEndian.PutUint32(bytes[4*i:], math.Float32bits(v))
	}
	m.Storage = &pb.Tensor_InlineData{InlineData: bytes}
	return m
}

// target asks for a result in this tensor.
func (t *Tensor) target() *pb.TensorTarget {
	if t.slice != nil {
		return &pb.TensorTarget{Destination: &pb.TensorTarget_Slice{Slice: t.slice}}
	}
	return &pb.TensorTarget{Destination: &pb.TensorTarget_Inline{Inline: &pb.InlineTarget{}}}
}

// take copies what an answer carries inside; a result in a region is there already.
func (t *Tensor) take(answer *pb.Tensor) error {
	if t.slice != nil {
		return nil
	}
	bytes := answer.GetInlineData()
	if len(bytes) != 4*len(t.Values) {
		return status.Errorf(codes.Internal, "the answer has %d bytes, not %d", len(bytes), 4*len(t.Values))
	}
	for i := range t.Values {
		t.Values[i] = math.Float32frombits(binary.LittleEndian.Uint32(bytes[4*i:]))
	}
	return nil
}

// tryRegion: whether regions can be had here, by making one.
func (s *Session) tryRegion() error {
	t, err := s.NewTensor(1)
	if err == nil {
		t.Free()
	}
	return err
}

// newRegion makes a region and maps it. Not repeated: a lost answer would leave a region that nobody knows.
func (s *Session) newRegion(bytes uint64) (id string, memory []byte, err error) {
	if s.brokerPath == "" {
		return "", nil, status.Error(codes.Unavailable, "the daemon has no broker socket")
	}
	var made *pb.CreateRegionResponse
	err = s.once(func(ctx context.Context) (err error) {
		made, err = s.client.sessions.CreateRegion(ctx, &pb.CreateRegionRequest{
			SessionId: s.id, Kind: pb.RegionKind_REGION_KIND_MEMFD, SizeBytes: bytes})
		return err
	})
	if err != nil {
		return "", nil, err
	}
	id = made.Region.RegionId
	memory, err = mapRegion(s.brokerPath, s.id, id, made.Region.LengthBytes)
	if err != nil {
		s.releaseRegion(id)
		return "", nil, status.Errorf(codes.Unavailable, "broker socket: %s", err)
	}
	return id, memory, nil
}

// releaseRegion gives a region back. An error is no matter: it goes with the session.
func (s *Session) releaseRegion(id string) {
	s.once(func(ctx context.Context) error {
		_, err := s.client.sessions.ReleaseRegion(ctx, &pb.ReleaseRegionRequest{SessionId: s.id, RegionId: id})
		return err
	})
}

// mapRegion asks the broker for a region's descriptor and maps it: docs/broker.md.
func mapRegion(brokerPath, session, region string, length uint64) ([]byte, error) {
	socket, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: brokerPath, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	socket.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := socket.Write([]byte("LMN1" + session + region)); err != nil {
		return nil, err
	}
	answer := make([]byte, 12)
	ancillary := make([]byte, syscall.CmsgSpace(4)) // room for one descriptor
	n, ancillaryBytes, _, _, err := socket.ReadMsgUnix(answer, ancillary)
	if err != nil {
		return nil, err
	}
	descriptor := -1
	if messages, err := syscall.ParseSocketControlMessage(ancillary[:ancillaryBytes]); err == nil && len(messages) == 1 {
		if descriptors, err := syscall.ParseUnixRights(&messages[0]); err == nil && len(descriptors) == 1 {
			descriptor = descriptors[0]
			defer syscall.Close(descriptor) // the mapping stays
		}
	}
	if n != len(answer) {
		return nil, fmt.Errorf("%s refuses this user", brokerPath)
	}
	code, told := binary.LittleEndian.Uint32(answer), binary.LittleEndian.Uint64(answer[4:])
	if code != 0 || descriptor < 0 || told != length {
		// Another daemon's: one on another host names the same path, say.
		return nil, fmt.Errorf("%s does not know the region (status %d)", brokerPath, code)
	}
	return syscall.Mmap(descriptor, 0, int(length), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
}
