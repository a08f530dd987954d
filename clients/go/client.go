// Package dnd labels the neurons of vision networks in words: a client of Describe-and-Dissect. The generated messages and clients are in dndv1.
package dnd

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/url"

	"dnd.example/go/dndv1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/protobuf/proto"
)

const (
	maxMessageBytes = 64 << 20
	maxDigests      = 10_000
)

// Client calls a mesh. Calls whose mesh is away are made again for about a minute; what fails is an *Error. The generated clients are for all that has no
// method here; ErrorOf reads what they return.
type Client struct {
	DissectService dndv1.DissectServiceClient
	PictureService dndv1.PictureServiceClient
	UploadService  dndv1.UploadServiceClient
}

// Options say how a mesh is spoken to.
type Options struct {
	// Token is shown with each call.
	Token string
	// TLS is for https endpoints; nil trusts the system's authorities.
	TLS *tls.Config
}

// Progress is told how far the stages are. It may be nil.
type Progress func(*dndv1.StageProgress)

// Connect gives a client of the orchestrator at an endpoint, and what closes its connection. The endpoint is such as "http://127.0.0.1:50051", for this machine
// alone, or with https.
func Connect(endpoint string, options Options) (*Client, io.Closer, error) {
	place, err := url.Parse(endpoint)
	if err != nil || place.Host == "" || (place.Scheme != "http" && place.Scheme != "https") {
		return nil, nil, fmt.Errorf("%q is no endpoint: write it as http://127.0.0.1:50051, or with https", endpoint)
	}
	transport := local.NewCredentials()
	if place.Scheme == "https" {
		transport = credentials.NewTLS(options.TLS)
	} else if host := place.Hostname(); host != "localhost" && !net.ParseIP(host).IsLoopback() {
		return nil, nil, fmt.Errorf("%s would be spoken to in the clear: use https, or New with a connection of your own", endpoint)
	}
	dial := []grpc.DialOption{grpc.WithTransportCredentials(transport), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes))}
	if options.Token != "" {
		dial = append(dial, grpc.WithPerRPCCredentials(token(options.Token)))
	}
	// Not NewClient, which grpc has only had since 1.63.
	conn, err := grpc.Dial(place.Host, dial...)
	if err != nil {
		return nil, nil, err
	}
	return New(conn), conn, nil
}

// New gives a client over a connection of one's own.
func New(conn grpc.ClientConnInterface) *Client {
	return &Client{dndv1.NewDissectServiceClient(conn), dndv1.NewPictureServiceClient(conn), dndv1.NewUploadServiceClient(conn)}
}

type token string

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(t)}, nil
}

// RequireTransportSecurity is false for this machine, the only one that Connect speaks to in the clear.
func (token) RequireTransportSecurity() bool { return false }

// Dissect labels units, and comes back when all have ended. With the same RequestId the same job is found again, by another process too.
func (c *Client) Dissect(ctx context.Context, request *dndv1.DissectRequest, progress Progress) (*Dissection, error) {
	if request.GetRequestId() == "" {
		// An id of its own lets a call that was broken off be made again without a second job.
		request = proto.Clone(request).(*dndv1.DissectRequest)
		id := make([]byte, 16)
		if _, err := rand.Read(id); err != nil {
			return nil, err
		}
		request.RequestId = hex.EncodeToString(id)
	}
	var created *dndv1.CreateJobResponse
	err := retried(ctx, func() (err error) {
		created, err = c.DissectService.CreateJob(ctx, &dndv1.CreateJobRequest{Request: request})
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.follow(ctx, created.GetJob(), progress)
}

// Follow gives the results of a job when it has ended.
func (c *Client) Follow(ctx context.Context, jobID string, progress Progress) (*Dissection, error) {
	var got *dndv1.GetJobResponse
	err := retried(ctx, func() (err error) {
		got, err = c.DissectService.GetJob(ctx, &dndv1.GetJobRequest{JobId: jobID})
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.follow(ctx, got.GetJob(), progress)
}

func (c *Client) follow(ctx context.Context, job *dndv1.Job, progress Progress) (*Dissection, error) {
	dissection := newDissection(job)
	err := c.Watch(ctx, job.GetJobId(), 0, func(event *dndv1.JobEvent) error {
		if stage := event.GetProgress(); stage != nil && progress != nil {
			progress(stage)
		}
		return dissection.take(event)
	})
	if err != nil && err != errEnded {
		return nil, err
	}
	return dissection, nil
}

// Watch tells what happens in a job, after the event of a number, until it has ended, or until what is told returns an error, which it then returns. A broken
// connection is made again, and no numbered event is missed.
func (c *Client) Watch(ctx context.Context, jobID string, after uint64, tell func(*dndv1.JobEvent) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for patience := newPatience(); ; {
		stream, err := c.DissectService.WatchJob(ctx, &dndv1.WatchJobRequest{JobId: jobID, After: after})
		for err == nil {
			var response *dndv1.WatchJobResponse
			if response, err = stream.Recv(); err != nil {
				break
			}
			patience = newPatience()
			if number := response.GetEvent().GetNumber(); number > after {
				after = number
			}
			if err := tell(response.GetEvent()); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err := patience.wait(ctx, err); err != nil {
			return err
		}
	}
}

// SelectConcept lets concepts of one's own compete for a unit.
func (c *Client) SelectConcept(ctx context.Context, request *dndv1.SelectConceptRequest, progress Progress) (*dndv1.UnitResult, error) {
	var unit *dndv1.UnitResult
	err := retried(ctx, func() error {
		stream, err := c.DissectService.SelectConcept(ctx, request)
		if err != nil {
			return err
		}
		for {
			event, err := stream.Recv()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			if stage := event.GetProgress(); stage != nil && progress != nil {
				progress(stage)
			}
			if event.GetUnit() != nil {
				unit = event.GetUnit()
			}
		}
	})
	if err == nil && unit == nil {
		err = &Error{Code: codes.Internal, Message: "the selection ended without a result"}
	}
	return unit, err
}

// Pictures gives the pictures that results name, by digest. What is not kept any more is left out.
func (c *Client) Pictures(ctx context.Context, digests ...string) (map[string][]byte, error) {
	found := map[string][]byte{}
	for len(digests) > 0 {
		some := digests
		if len(some) > maxDigests {
			some = some[:maxDigests]
		}
		digests = digests[len(some):]
		err := retried(ctx, func() error { return c.pictures(ctx, some, found) })
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

func (c *Client) pictures(ctx context.Context, digests []string, found map[string][]byte) error {
	stream, err := c.PictureService.GetPictures(ctx, &dndv1.GetPicturesRequest{Digests: digests})
	if err != nil {
		return err
	}
	for {
		got, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if picture, ok := got.GetResult().(*dndv1.GetPicturesResponse_Picture); ok {
			found[got.GetDigest()] = picture.Picture
		}
	}
}
