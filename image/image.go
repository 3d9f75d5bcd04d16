// Package image turns image references into verified layers on disk: one read-only EROFS file per layer, kept in a
// store that any number of processes may use at once.
//
//	store, err := image.Open("", log)
//	ref, err := image.ParseReference("debian:12")
//	img, err := store.Pull(ctx, ref, image.PullOptions{})
//	for _, l := range img.Layers {
//		fmt.Println(l.DiffID, l.Path)
//	}
//
// Sources: registries, a docker daemon, a containerd, docker archives, OCI layouts and OCI archives. Nothing is
// renamed into the store before its digest and size were checked while it was read.
//
// The way back: a layer's tar byte for byte, archives as docker save writes them, a push; and new images from a tar, alone
// or on top of another image's layers. Names, removal and history are docker's.
package image

import (
	"errors"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Platform is the only one whose images run.
const Platform = "linux/amd64"

// MaxLayers is the most layers an image may have: docker's own limit.
const MaxLayers = 127

// Errors that callers decide on; they come wrapped.
var (
	// ErrNotFound says that the source, or the store, has no such image.
	ErrNotFound = errors.New("no such image")
	// ErrUnauthorized says that the registry wants (other) credentials.
	ErrUnauthorized = errors.New("not authorized")
	// ErrPlatform says that the image is not for linux/amd64.
	ErrPlatform = errors.New("image is not for " + Platform)
	// ErrUnsupported says that what was found is not a container image this store can hold.
	ErrUnsupported = errors.New("not a supported image")
	// ErrCorrupt says that bytes did not have the digest or size they were promised with.
	ErrCorrupt = errors.New("content does not match its digest")
)

// Config is the image configuration with docker's additions (Healthcheck, OnBuild, Shell).
type Config = dockerspec.DockerOCIImage

// Image is an image in the store. It is a value: nothing in it changes after it was returned.
type Image struct {
	// Ref is the name under which the store keeps the image: "docker.io/library/debian:12" for images with a
	// name, the absolute spelling of the source ("oci:/srv/layout:latest") for those without.
	Ref string
	// Source is the reference the image came from, as it was written.
	Source string
	// Transport says where that led in the end.
	Transport Transport
	// Digest is that of the manifest. For sources without a manifest (docker daemon, docker archive) it is the
	// digest of the OCI manifest that describes the same configuration and uncompressed layers.
	Digest digest.Digest
	// ConfigDigest is docker's image ID.
	ConfigDigest digest.Digest
	Config       Config
	// RawConfig is the configuration as it was read; ConfigDigest is its digest.
	RawConfig []byte
	// Parent is the ID of the image that a committed one was made from; else empty. That image may be gone.
	Parent digest.Digest
	// Layers are the image's layers, oldest first. A layer may be there twice.
	Layers []Layer
	// Pulled is when the image was written to the store.
	Pulled time.Time
}

// Layer is a layer in the store.
type Layer struct {
	// DiffID is the digest of the uncompressed tar and the layer's identity.
	DiffID digest.Digest
	// Path is the EROFS file. It is never changed once it is there, so a bundle may link to it, with a
	// lease (see Store.Lease) while it does.
	Path string
	// Size is that of the EROFS file, a multiple of 4096.
	Size int64
	// Blob describes the layer as its source stored it; a push refers to it. Its digest is the DiffID when the
	// source had an uncompressed tar.
	Blob ocispec.Descriptor
}

// Unique returns the layers without repetitions, in order of first use.
func Unique(layers []Layer) []Layer {
	seen := make(map[digest.Digest]bool, len(layers))
	var out []Layer
	for _, l := range layers {
		if !seen[l.DiffID] {
			seen[l.DiffID] = true
			out = append(out, l)
		}
	}
	return out
}

// Runs says whether the image runs here: nil, or an error that is [ErrPlatform].
func (i *Image) Runs() error { return runs(&i.Config) }

// Size is the disk use of the image's layers, each counted once.
func (i *Image) Size() int64 {
	var n int64
	for _, l := range Unique(i.Layers) {
		n += l.Size
	}
	return n
}
