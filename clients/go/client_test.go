package dnd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dnd.example/go/dndv1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// mesh has one job of two units. It was cancelled once, and resumed. The first call finds it full, and each watcher is cut off after
// three events.
type mesh struct {
	dndv1.UnimplementedDissectServiceServer
	dndv1.UnimplementedPictureServiceServer
	dndv1.UnimplementedUploadServiceServer
	uploads            map[string][]byte
	uploadCalls        int
	requestIDs, tokens []string
	watched            []uint64
	selections         int
}

func (m *mesh) CreateJob(ctx context.Context, request *dndv1.CreateJobRequest) (*dndv1.CreateJobResponse, error) {
	headers, _ := metadata.FromIncomingContext(ctx)
	m.tokens = append(m.tokens, headers.Get("authorization")...)
	m.requestIDs = append(m.requestIDs, request.GetRequest().GetRequestId())
	if request.GetRequest().GetLayers()[0].GetLayer() == "nowhere" {
		info := &errdetails.ErrorInfo{Reason: "UNKNOWN_LAYER", Domain: "dnd.v1"}
		field := &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "layers[0].layer"}}}
		failed, _ := status.New(codes.InvalidArgument, "no such layer").WithDetails(info, field)
		return nil, failed.Err()
	}
	if len(m.requestIDs) == 1 {
		failed, _ := status.New(codes.ResourceExhausted, "full").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(10 * time.Millisecond)})
		return nil, failed.Err()
	}
	return &dndv1.CreateJobResponse{Job: &dndv1.Job{JobId: "job", LastEvent: 3}}, nil
}

func (m *mesh) GetJob(_ context.Context, request *dndv1.GetJobRequest) (*dndv1.GetJobResponse, error) {
	job := &dndv1.Job{JobId: request.GetJobId(), LastEvent: 3}
	if job.JobId == "waiting" {
		job.LastEvent = 1
	}
	return &dndv1.GetJobResponse{Job: job}, nil
}

func (m *mesh) SelectConcept(request *dndv1.SelectConceptRequest, stream dndv1.DissectService_SelectConceptServer) error {
	m.selections++
	progress := &dndv1.SelectConceptResponse_Progress{Progress: &dndv1.StageProgress{Done: uint64(m.selections)}}
	if err := stream.Send(&dndv1.SelectConceptResponse{Event: progress}); err != nil {
		return err
	}
	if m.selections == 1 {
		return status.Error(codes.Unavailable, "gone")
	}
	result := &dndv1.SelectConceptResponse_Unit{Unit: &dndv1.UnitResult{Label: request.GetConcepts()[1]}}
	return stream.Send(&dndv1.SelectConceptResponse{Event: result})
}

func unit(number uint32, label string) *dndv1.JobEvent_Unit {
	return &dndv1.JobEvent_Unit{Unit: &dndv1.UnitResult{Layer: "colour", Unit: number, Label: label}}
}

func (m *mesh) WatchJob(request *dndv1.WatchJobRequest, stream dndv1.DissectService_WatchJobServer) error {
	m.watched = append(m.watched, request.GetAfter())
	accepted := &dndv1.JobAccepted{Layers: []*dndv1.LayerUnits{{Layer: "colour", Units: []uint32{3, 0}}}}
	events := []*dndv1.JobEvent{
		{Number: 1, Event: &dndv1.JobEvent_Accepted{Accepted: accepted}},
		{Number: 2, Event: &dndv1.JobEvent_Done{Done: &dndv1.JobDone{Cancelled: true}}},
		{Number: 3, Event: unit(0, "red")},
		{Number: 4, Event: unit(3, "green")},
		{Number: 5, Event: &dndv1.JobEvent_Done{Done: &dndv1.JobDone{Labelled: 2}}},
	}
	if request.GetJobId() == "waiting" {
		paused := &dndv1.JobPaused{Reason: "LLM_BUDGET", Message: "the budget is reached"}
		if err := stream.Send(&dndv1.WatchJobResponse{Event: &dndv1.JobEvent{Number: 1, Event: &dndv1.JobEvent_Paused{Paused: paused}}}); err != nil {
			return err
		}
		return status.Error(codes.Internal, "nobody should wait for more")
	}
	to := request.GetAfter() + 3
	if to > 5 {
		to = 5
	}
	for _, event := range events[request.GetAfter():to] {
		if err := stream.Send(&dndv1.WatchJobResponse{Event: event}); err != nil {
			return err
		}
	}
	if request.GetAfter() < 3 {
		return status.Error(codes.Unavailable, "gone")
	}
	return nil
}

func (m *mesh) GetPictures(request *dndv1.GetPicturesRequest, stream dndv1.PictureService_GetPicturesServer) error {
	for _, digest := range request.GetDigests() {
		answer := &dndv1.GetPicturesResponse{Digest: digest}
		if digest == "kept" {
			answer.Result = &dndv1.GetPicturesResponse_Picture{Picture: []byte{1}}
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
	}
	return nil
}

func (m *mesh) CheckUploads(_ context.Context, request *dndv1.CheckUploadsRequest) (*dndv1.CheckUploadsResponse, error) {
	checked := &dndv1.CheckUploadsResponse{}
	for _, digest := range request.GetDigests() {
		if arrived := m.uploads[digest]; digestOfBytes(arrived) != digest {
			checked.Missing = append(checked.Missing, &dndv1.MissingBlob{Digest: digest, Received: uint64(len(arrived))})
		}
	}
	return checked, nil
}

// Upload goes away after the first piece that it ever took.
func (m *mesh) Upload(stream dndv1.UploadService_UploadServer) error {
	m.uploadCalls++
	for {
		piece, err := stream.Recv()
		if err == io.EOF {
			return stream.SendAndClose(&dndv1.UploadResponse{})
		}
		if err != nil {
			return err
		}
		arrived := m.uploads[piece.GetDigest()]
		if piece.GetOffset() != uint64(len(arrived)) || len(piece.GetData()) > 1<<20 || piece.GetOffset()+uint64(len(piece.GetData())) > piece.GetSize() {
			return status.Errorf(codes.InvalidArgument, "a piece at %d of %d, after %d", piece.GetOffset(), piece.GetSize(), len(arrived))
		}
		m.uploads[piece.GetDigest()] = append(arrived, piece.GetData()...)
		if m.uploadCalls == 1 {
			return status.Error(codes.Unavailable, "gone")
		}
	}
}

func digestOfBytes(content []byte) string {
	return fmt.Sprintf("%x", sha256.Sum256(content))
}

// start gives a mesh and a client of it.
func start(t *testing.T) (*mesh, *Client) {
	t.Helper()
	m, server := &mesh{uploads: map[string][]byte{}}, grpc.NewServer()
	dndv1.RegisterDissectServiceServer(server, m)
	dndv1.RegisterPictureServiceServer(server, m)
	dndv1.RegisterUploadServiceServer(server, m)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	client, connection, err := Connect("http://"+listener.Addr().String(), Options{Token: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = connection.Close() })
	return m, client
}

func asking(layer string) *dndv1.DissectRequest {
	return &dndv1.DissectRequest{Layers: []*dndv1.LayerUnits{{Layer: layer, Units: []uint32{3, 0}}}}
}

func TestAJobIsFollowedThroughAFullMeshAndABrokenStream(t *testing.T) {
	m, client := start(t)
	result, err := client.Dissect(context.Background(), asking("colour"), nil)
	if err != nil {
		t.Fatal(err)
	}
	labels := ""
	for _, unit := range result.Units() {
		labels += fmt.Sprint(unit.GetUnit(), unit.GetLabel(), " ")
	}
	if labels != "3green 0red " || result.Unit("colour", 0).GetLabel() != "red" || result.Done.GetLabelled() != 2 {
		t.Errorf("not what was asked for, or not in its order: %s", labels)
	}
	if fmt.Sprint(m.watched) != "[0 3]" {
		t.Errorf("the watch does not go on after the last event: %v", m.watched)
	}
	if len(m.requestIDs) != 2 || m.requestIDs[0] == "" || m.requestIDs[0] != m.requestIDs[1] {
		t.Errorf("more than one job: %v", m.requestIDs)
	}
	if fmt.Sprint(m.tokens) != "[Bearer secret Bearer secret]" {
		t.Errorf("tokens: %v", m.tokens)
	}
}

func TestAnErrorSaysWhyAndWhereAndIsNotTriedAgain(t *testing.T) {
	m, client := start(t)
	_, err := client.Dissect(context.Background(), asking("nowhere"), nil)
	var e *Error
	if !errors.As(err, &e) || e.Code != codes.InvalidArgument || e.Reason != "UNKNOWN_LAYER" || e.Field != "layers[0].layer" {
		t.Errorf("%#v", err)
	}
	if err.Error() != "UNKNOWN_LAYER: no such layer (field layers[0].layer)" {
		t.Error(err)
	}
	if len(m.requestIDs) != 1 {
		t.Errorf("tried %d times", len(m.requestIDs))
	}
}

func TestWhoStopsWatchingHearsWhy(t *testing.T) {
	_, client := start(t)
	enough := errors.New("enough")
	if err := client.Watch(context.Background(), "job", 0, func(*dndv1.JobEvent) error { return enough }); err != enough {
		t.Error(err)
	}
}

func TestAJobIsFoundAgainByItsIDAndOneThatWaitsForSomeoneSaysSo(t *testing.T) {
	_, client := start(t)
	result, err := client.Follow(context.Background(), "job", nil)
	if err != nil || result.Unit("colour", 3).GetLabel() != "green" {
		t.Error(result, err)
	}
	_, err = client.Follow(context.Background(), "waiting", nil)
	var e *Error
	if !errors.As(err, &e) || e.Reason != "LLM_BUDGET" || e.Message != "the budget is reached" {
		t.Errorf("%#v", err)
	}
}

func TestConceptsCompeteAlsoWhenTheMeshGoesAway(t *testing.T) {
	_, client := start(t)
	var seen []uint64
	progress := func(stage *dndv1.StageProgress) { seen = append(seen, stage.GetDone()) }
	unit, err := client.SelectConcept(context.Background(), &dndv1.SelectConceptRequest{Concepts: []string{"sea", "sky"}}, progress)
	if err != nil || unit.GetLabel() != "sky" || fmt.Sprint(seen) != "[1 2]" {
		t.Error(unit, seen, err)
	}
}

func TestPicturesThatAreNotKeptAnyMoreAreLeftOut(t *testing.T) {
	_, client := start(t)
	found, err := client.Pictures(context.Background(), "kept", "gone")
	if err != nil || len(found) != 1 || len(found["kept"]) != 1 {
		t.Error(found, err)
	}
}

func TestABrokenUploadGoesOnWhereItStoppedAndWhatIsThereIsNotSentAgain(t *testing.T) {
	m, client := start(t)
	network, file := bytes.Repeat([]byte("0123456789"), 150_000), filepath.Join(t.TempDir(), "net.onnx")
	write(t, file, network)
	for i := 0; i < 2; i++ {
		if digest, err := client.Upload(context.Background(), file); err != nil || digest != digestOfBytes(network) {
			t.Fatal(digest, err)
		}
	}
	if len(m.uploads) != 1 || !bytes.Equal(m.uploads[digestOfBytes(network)], network) || m.uploadCalls != 2 {
		t.Errorf("%d blobs in %d calls", len(m.uploads), m.uploadCalls)
	}
	if _, err := client.Upload(context.Background(), file+".none"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestAFoldersPicturesAreUploadedAndListedByTheBytesOfTheirPaths(t *testing.T) {
	m, client := start(t)
	folder := t.TempDir()
	for _, name := range []string{"b.PNG", "a/é.jpg", "a/z.jpg", "B.png", ".hidden.png", "notes.txt"} {
		write(t, filepath.Join(folder, name), []byte(name))
	}
	source, err := client.UploadPictures(context.Background(), folder)
	if err != nil {
		t.Fatal(err)
	}
	list, paths := &dndv1.PictureList{}, ""
	if err := proto.Unmarshal(m.uploads[source.GetListDigest()], list); err != nil {
		t.Fatal(err)
	}
	for _, picture := range list.GetPictures() {
		paths += picture.GetPath() + " "
		if string(m.uploads[picture.GetDigest()]) != picture.GetPath() {
			t.Errorf("%s has not arrived", picture.GetPath())
		}
	}
	if paths != "B.png a/z.jpg a/é.jpg b.PNG " || len(m.uploads) != 5 {
		t.Errorf("%s in %d blobs", paths, len(m.uploads))
	}
	if _, err := client.UploadPictures(context.Background(), t.TempDir()); err == nil || !strings.Contains(err.Error(), "no pictures") {
		t.Error(err)
	}
	if _, err := client.UploadPictures(context.Background(), filepath.Join(folder, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o666); err != nil {
		t.Fatal(err)
	}
}

func TestNothingGoesInTheClearToAnotherMachine(t *testing.T) {
	for endpoint, refusal := range map[string]string{
		"http://mesh.example:50051": "in the clear",
		"http://192.0.2.1:50051":    "in the clear",
		"127.0.0.1:50051":           "is no endpoint",
		"http://":                   "is no endpoint",
	} {
		if _, _, err := Connect(endpoint, Options{Token: "secret"}); err == nil || !strings.Contains(err.Error(), refusal) {
			t.Errorf("%s: %v", endpoint, err)
		}
	}
}
