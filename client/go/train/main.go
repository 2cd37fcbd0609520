// Command train makes a small stack, trains it for a few steps and prints one loss a step: the mean of y squared.
//
// The programs of the other languages do the same sums in the same order and print the same losses to the last bit.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"google.golang.org/grpc/status"

	"lamina.dev/lamina"
	pb "lamina.dev/lamina/v1"
)

const batch, sequence, hidden = 4, 16, 32

func train(target, transport string, steps int) error {
	client, err := lamina.Connect(target)
	if err != nil {
		return err
	}
	defer client.Close()
	session, err := client.OpenSession(context.Background(), lamina.SessionOptions{Name: "train-go", Transport: transport})
	if err != nil {
		return err
	}
	defer session.Close()
	name, reason := session.Transport()
	if reason != "" {
		reason = " (" + reason + ")"
	}
	fmt.Printf("transport: %s%s\n", name, reason)

	seed := int64(1)
	stackName := fmt.Sprintf("train-go-%d", os.Getpid())
	stack, err := session.CreateStack(stackName, &pb.StackConfig{
		BatchSize: batch, MaxSeqLength: sequence, HiddenSize: hidden, Heads: 4, NumHiddenLayers: 2,
		AttnDropoutRatio: 0.1, HiddenDropoutRatio: 0.1, Seed: &seed})
	if err != nil {
		return err
	}
	defer client.DeleteStack(stackName) // it would outlive this program

	var x, y, dy *lamina.Tensor
	for _, t := range []**lamina.Tensor{&x, &y, &dy} {
		if *t, err = session.NewTensor(batch, sequence, hidden); err != nil {
			return err
		}
	}
	for i := range x.Values {
		x.Values[i] = float32(i*37%101-50) / 64 // exact in fp32
	}
	for step := 0; step < steps; step++ {
		saved, err := stack.Forward(x, y)
		if err != nil {
			return err
		}
		var sum float64
		for i, v := range y.Values {
			sum += float64(v) * float64(v)
			dy.Values[i] = 2 * v / float32(len(y.Values))
		}
		fmt.Printf("step %d  loss %.17g\n", step, sum/float64(len(y.Values)))
		if err := stack.Backward(saved, dy, nil); err != nil {
			return err
		}
		if _, err := stack.ApplyGradients(&pb.ApplyGradientsRequest{LearningRate: 1e-2, ZeroGradients: true}); err != nil {
			return err
		}
	}
	return nil
}

func main() {
	target := flag.String("target", lamina.DefaultTarget(), "the daemon: unix:PATH or HOST:PORT")
	transport := flag.String("transport", "auto", "auto, memfd or inline")
	steps := flag.Int("steps", 10, "steps to train, 1 or more")
	flag.Parse()
	known := map[string]bool{"auto": true, "memfd": true, "inline": true}
	if flag.NArg() > 0 || *steps < 1 || !known[*transport] {
		fmt.Fprintln(os.Stderr, "train: wrong arguments: see -help")
		os.Exit(2)
	}
	if err := train(*target, *transport, *steps); err != nil {
		request := lamina.RequestID(err)
		if request != "" {
			request = " (request " + request + ")"
		}
		fmt.Fprintf(os.Stderr, "train: %s: %s: %s%s\n", *target, status.Code(err), status.Convert(err).Message(), request)
		os.Exit(1)
	}
}
