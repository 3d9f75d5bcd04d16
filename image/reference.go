package image

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Transport says where a reference points.
type Transport string

// The transports, spelled as skopeo spells them, and Any for a plain NAME.
const (
	Any           Transport = ""               // the local docker daemon if it has the image, else the registry
	Registry      Transport = "docker"         // docker://NAME[:TAG][@DIGEST]; docker+http:// for plain HTTP
	DockerDaemon  Transport = "docker-daemon"  // docker-daemon:NAME[:TAG] or docker-daemon:sha256:ID
	DockerArchive Transport = "docker-archive" // docker-archive:FILE[:REF]
	OCILayout     Transport = "oci"            // oci:DIR[:REF]
	OCIArchive    Transport = "oci-archive"    // oci-archive:FILE[:REF]
	Containerd    Transport = "containerd"     // containerd:REF
)

// MaxReference is the longest reference that is looked at.
const MaxReference = 4096

// Reference is a parsed image reference. Its zero value refers to nothing; make one with ParseReference.
type Reference struct {
	text      string
	transport Transport
	plainHTTP bool
	path      string          // archives and layouts: absolute
	inner     string          // archives and layouts: the image inside, as written
	named     reference.Named // names; for an archive, its inner reference if that is a name
	id        digest.Digest   // docker-daemon:sha256:…
}

// ParseReference reads a reference as people write them:
//
//	NAME[:TAG][@DIGEST]               the docker daemon's image if it has it, else the registry's
//	docker://NAME[:TAG][@DIGEST]      the registry's image
//	docker+http://NAME[:TAG][@DIGEST] the same from a registry that speaks plain HTTP
//	docker-daemon:NAME[:TAG]          the docker daemon's image (or docker-daemon:sha256:ID)
//	docker-archive:FILE[:NAME[:TAG]]  an image in what docker save wrote
//	oci:DIR[:REF], oci-archive:FILE[:REF]  an image in an OCI layout
//	containerd:NAME[:TAG]             an image of a containerd
//
// FILE and DIR end at the first colon.
func ParseReference(s string) (Reference, error) {
	r, err := parseReference(s)
	if err != nil {
		if len(s) > 200 {
			s = s[:200] + "…"
		}
		return Reference{}, fmt.Errorf("parse image reference %q: %w", s, err)
	}
	return r, nil
}

func parseReference(s string) (Reference, error) {
	switch {
	case s == "":
		return Reference{}, fmt.Errorf("empty")
	case len(s) > MaxReference:
		return Reference{}, fmt.Errorf("%d bytes are more than the limit of %d", len(s), MaxReference)
	case strings.ContainsAny(s, "\x00\n\r"):
		return Reference{}, fmt.Errorf("control character in it")
	}
	r := Reference{text: s}
	scheme, rest, found := strings.Cut(s, ":")
	if !found {
		scheme = ""
	}
	var err error
	switch scheme {
	case "docker", "docker+http":
		name, ok := strings.CutPrefix(rest, "//")
		if !ok {
			// "docker:20.10" is an image called docker.
			if scheme == "docker" {
				break
			}
			return Reference{}, fmt.Errorf("want %s://NAME", scheme)
		}
		r.transport, r.plainHTTP = Registry, scheme == "docker+http"
		r.named, err = parseName(name)
		return r, err
	case string(DockerDaemon):
		r.transport = DockerDaemon
		if strings.HasPrefix(rest, "sha256:") {
			r.id, err = digest.Parse(rest)
			return r, err
		}
		r.named, err = parseName(rest)
		return r, err
	case string(Containerd):
		r.transport = Containerd
		r.named, err = parseName(rest)
		return r, err
	case string(DockerArchive), string(OCILayout), string(OCIArchive):
		r.transport = Transport(scheme)
		path, inner, hasInner := strings.Cut(rest, ":")
		if path == "" {
			return Reference{}, fmt.Errorf("no path after %s:", scheme)
		}
		if hasInner && inner == "" {
			return Reference{}, fmt.Errorf("empty reference after the path")
		}
		if r.path, err = filepath.Abs(path); err != nil {
			return Reference{}, err
		}
		r.inner = inner
		if r.transport == DockerArchive && inner != "" {
			if r.named, err = parseName(inner); err != nil {
				return Reference{}, err
			}
		}
		return r, nil
	case "dir", "containers-storage", "ostree", "docker-archive+gzip", "http", "https", "oci+http":
		return Reference{}, fmt.Errorf("transport %q is not known (known: docker://, docker+http://, docker-daemon:, docker-archive:, oci:, oci-archive:, containerd:)", scheme)
	}
	r.named, err = parseName(s)
	return r, err
}

func parseName(s string) (reference.Named, error) {
	if s == "" {
		return nil, fmt.Errorf("no image name")
	}
	n, err := reference.ParseDockerRef(s) // a digest outweighs a tag, no tag means latest
	if err != nil {
		return nil, err
	}
	return n, nil
}

// String is the reference as it was written.
func (r Reference) String() string { return r.text }

// Transport says where the reference points.
func (r Reference) Transport() Transport { return r.transport }

// Path is the absolute path of an archive or layout, else empty.
func (r Reference) Path() string { return r.path }

// PlainHTTP says that the reference itself allows plain HTTP (docker+http://).
func (r Reference) PlainHTTP() bool { return r.plainHTTP }

// Name is the reference's full name, "docker.io/library/debian:12", or empty for an archive or layout without one.
func (r Reference) Name() string {
	if r.named == nil {
		return ""
	}
	return r.named.String()
}

// Familiar is the name as docker shows it, "debian:12", or else the reference as it was written.
func (r Reference) Familiar() string {
	if r.named == nil {
		return r.text
	}
	return reference.FamiliarString(r.named)
}

// Key is the name under which the store keeps what the reference points to, when the source knows no better one.
func (r Reference) Key() string {
	switch {
	case r.named != nil:
		return r.named.String()
	case r.id != "":
		return string(DockerDaemon) + ":" + r.id.String()
	case r.inner != "":
		return string(r.transport) + ":" + r.path + ":" + r.inner
	}
	return string(r.transport) + ":" + r.path
}

// domain and repository are the registry's host and the name there.
func (r Reference) domain() string     { return reference.Domain(r.named) }
func (r Reference) repository() string { return reference.Path(r.named) }

// target is what stands after the registry's /manifests/: tag or digest.
func (r Reference) target() string {
	if d, ok := r.named.(reference.Digested); ok {
		return d.Digest().String()
	}
	if t, ok := r.named.(reference.Tagged); ok {
		return t.Tag()
	}
	return "latest"
}

// pinned is the digest in the reference, or empty.
func (r Reference) pinned() digest.Digest {
	if d, ok := r.named.(reference.Digested); ok {
		return d.Digest()
	}
	return ""
}
