// Upload uploads a network and a folder of pictures for a mesh that can't read them: `upload ENDPOINT TARGET PICTURES`. It prints their digests, which a job
// names as its target's Digest and its probing set's ListDigest.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	dnd "dnd.example/go"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 {
		log.Fatal("usage: upload ENDPOINT TARGET PICTURES")
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		log.Fatal("error: ", err)
	}
}

func run(endpoint, target, pictures string) error {
	client, connection, err := dnd.Connect(endpoint, dnd.Options{})
	if err != nil {
		return err
	}
	defer connection.Close()
	digest, err := client.Upload(context.Background(), target)
	if err != nil {
		return err
	}
	source, err := client.UploadPictures(context.Background(), pictures)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n%s\n", digest, source.GetListDigest())
	return nil
}
