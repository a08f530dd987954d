"""Uploads a network and a folder of pictures for a mesh that can't read them: `upload.py ENDPOINT TARGET PICTURES`. Prints their digests, which a job names as
its target's `digest` and its probing set's `list_digest`."""

import sys

import dnd

if __name__ == "__main__":
    endpoint, target, pictures = sys.argv[1:]
    with dnd.Client(endpoint) as client:
        print(client.upload(target))
        print(client.upload_pictures(pictures).list_digest)
