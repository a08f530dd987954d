package dnd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"dnd.example/go/dndv1"
	"google.golang.org/protobuf/proto"
)

const pieceBytes = 1 << 20

var endings = map[string]bool{
	".bmp": true, ".gif": true, ".jpeg": true, ".jpg": true, ".pbm": true, ".pgm": true, ".png": true, ".ppm": true, ".tif": true, ".tiff": true, ".webp": true,
}

// blob is a file by its path, or bytes.
type blob struct {
	path string
	data []byte
}

// Upload uploads a file, if it is not there yet, and gives its digest. The target's is Target{Digest: ..., Preprocessing: ...}.
func (c *Client) Upload(ctx context.Context, file string) (string, error) {
	digest, err := digestOf(file)
	if err != nil {
		return "", err
	}
	return digest, c.upload(ctx, []string{digest}, map[string]blob{digest: {path: file}})
}

// UploadPictures uploads the pictures of a folder and its subfolders that are not there yet.
func (c *Client) UploadPictures(ctx context.Context, folder string) (*dndv1.ProbingSource, error) {
	list, err := listed(folder)
	if err != nil {
		return nil, err
	}
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(list)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(encoded)
	digest := hex.EncodeToString(sum[:])
	digests, blobs := []string{digest}, map[string]blob{digest: {data: encoded}}
	for _, picture := range list.GetPictures() {
		if _, known := blobs[picture.GetDigest()]; !known {
			digests = append(digests, picture.GetDigest())
			blobs[picture.GetDigest()] = blob{path: filepath.Join(folder, filepath.FromSlash(picture.GetPath()))}
		}
	}
	return &dndv1.ProbingSource{Source: &dndv1.ProbingSource_ListDigest{ListDigest: digest}}, c.upload(ctx, digests, blobs)
}

func digestOf(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// listed gives the pictures of a folder and its subfolders, in the order that the mesh wants.
func listed(folder string) (*dndv1.PictureList, error) {
	list := &dndv1.PictureList{}
	err := filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		// What can't be looked at may have no entry.
		if err != nil || entry.IsDir() || strings.HasPrefix(entry.Name(), ".") || !endings[strings.ToLower(filepath.Ext(entry.Name()))] {
			return err
		}
		digest, err := digestOf(path)
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(folder, path)
		list.Pictures = append(list.Pictures, &dndv1.ListedPicture{Path: filepath.ToSlash(relative), Digest: digest})
		return err
	})
	if err == nil && len(list.Pictures) == 0 {
		err = fmt.Errorf("%s: no pictures in this folder", folder)
	}
	sort.Slice(list.Pictures, func(i, j int) bool { return list.Pictures[i].Path < list.Pictures[j].Path })
	return list, err
}

func (c *Client) upload(ctx context.Context, digests []string, blobs map[string]blob) error {
	for len(digests) > 0 {
		some := digests
		if len(some) > maxDigests {
			some = some[:maxDigests]
		}
		digests = digests[len(some):]
		if err := retried(ctx, func() error { return c.uploadMissing(ctx, some, blobs) }); err != nil {
			return err
		}
	}
	return nil
}

// uploadMissing uploads what is not there. What had arrived of a broken upload is not sent again.
func (c *Client) uploadMissing(ctx context.Context, digests []string, blobs map[string]blob) error {
	checked, err := c.UploadService.CheckUploads(ctx, &dndv1.CheckUploadsRequest{Digests: digests})
	if err != nil || len(checked.GetMissing()) == 0 {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.UploadService.Upload(ctx)
	if err != nil {
		return err
	}
	for _, missing := range checked.GetMissing() {
		err := blobs[missing.GetDigest()].send(stream, missing)
		if err == io.EOF {
			// The mesh has ended the call, and says why below.
			break
		}
		if err != nil {
			return err
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

// send sends what of a blob is not there yet, piece by piece.
func (b blob) send(stream dndv1.UploadService_UploadClient, missing *dndv1.MissingBlob) error {
	var content io.ReadSeeker = bytes.NewReader(b.data)
	if b.path != "" {
		file, err := os.Open(b.path)
		if err != nil {
			return err
		}
		defer file.Close()
		content = file
	}
	size, err := content.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	offset := int64(missing.GetReceived())
	if _, err := content.Seek(offset, io.SeekStart); err != nil {
		return err
	}
	for offset < size {
		data := make([]byte, pieceBytes)
		n, err := io.ReadFull(content, data)
		if err != nil && err != io.ErrUnexpectedEOF {
			return fmt.Errorf("%s: %w", b.path, err)
		}
		if err := stream.Send(&dndv1.UploadRequest{Digest: missing.GetDigest(), Size: uint64(size), Offset: uint64(offset), Data: data[:n]}); err != nil {
			return err
		}
		offset += int64(n)
	}
	return nil
}
