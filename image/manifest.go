package image

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Media types of docker's that are read beside OCI's.
const (
	dockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	dockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerSchema1      = "application/vnd.docker.distribution.manifest.v1+json"
	dockerSchema1Sig   = "application/vnd.docker.distribution.manifest.v1+prettyjws"
	dockerConfig       = "application/vnd.docker.container.image.v1+json"
	dockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	dockerLayerGzip    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	dockerLayerZstd    = "application/vnd.docker.image.rootfs.diff.tar.zstd"
	dockerForeign      = "application/vnd.docker.image.rootfs.foreign.diff.tar"
)

const maxManifests = 1000 // of an index

// document is any JSON that a reference may lead to.
type document struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	ArtifactType  string               `json:"artifactType"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	Annotations   map[string]string    `json:"annotations"`
	FSLayers      json.RawMessage      `json:"fsLayers"` // schema 1
}

// parseDocument tells an index from a manifest. The media type that the source gave is checked against the document's.
func parseDocument(b []byte, mediaType string) (*document, error) {
	if len(b) > maxDocument {
		return nil, fmt.Errorf("%w: a manifest of %d bytes, the limit is %d", ErrUnsupported, len(b), maxDocument)
	}
	var d document
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", ErrUnsupported, err)
	}
	if d.MediaType == "" {
		d.MediaType = mediaType
	}
	switch d.MediaType {
	case ocispec.MediaTypeImageManifest, dockerManifest, ocispec.MediaTypeImageIndex, dockerManifestList, "":
	case dockerSchema1, dockerSchema1Sig:
		return nil, fmt.Errorf("%w: docker's manifest schema 1 is too old; push the image again with a current docker", ErrUnsupported)
	default:
		return nil, fmt.Errorf("%w: manifest of type %.100q", ErrUnsupported, d.MediaType)
	}
	switch {
	case d.FSLayers != nil || d.SchemaVersion == 1:
		return nil, fmt.Errorf("%w: docker's manifest schema 1 is too old; push the image again with a current docker", ErrUnsupported)
	case d.SchemaVersion != 2:
		return nil, fmt.Errorf("%w: manifest of schema version %d", ErrUnsupported, d.SchemaVersion)
	case len(d.Manifests) > maxManifests:
		return nil, fmt.Errorf("%w: an index of %d manifests, the limit is %d", ErrUnsupported, len(d.Manifests), maxManifests)
	case d.isIndex() && d.Config != nil:
		return nil, fmt.Errorf("%w: index and manifest in one document", ErrUnsupported)
	case !d.isIndex() && d.Config == nil:
		return nil, fmt.Errorf("%w: a manifest without configuration", ErrUnsupported)
	}
	return &d, nil
}

func (d *document) isIndex() bool {
	return d.MediaType == ocispec.MediaTypeImageIndex || d.MediaType == dockerManifestList || d.MediaType == "" && d.Config == nil
}

// choose picks the manifest for linux/amd64 from an index.
func (d *document) choose() (ocispec.Descriptor, error) {
	best, bestRank := -1, 0
	var have []string
	for i, m := range d.Manifests {
		if m.Platform == nil {
			// An index of one image without platforms, as an OCI layout has.
			if rank := 1; rank > bestRank && isManifest(m.MediaType) {
				best, bestRank = i, rank
			}
			continue
		}
		p := *m.Platform
		if p.OS == "unknown" { // attestations
			continue
		}
		have = append(have, platformString(p))
		if p.OS != "linux" || p.Architecture != "amd64" {
			continue
		}
		// The plain one first: the variants ask for newer processors.
		rank := map[string]int{"": 6, "v1": 5, "v2": 4, "v3": 3, "v4": 2}[p.Variant]
		if rank > bestRank {
			best, bestRank = i, rank
		}
	}
	if best < 0 {
		if len(have) == 0 {
			return ocispec.Descriptor{}, fmt.Errorf("%w: the index names no image", ErrUnsupported)
		}
		return ocispec.Descriptor{}, fmt.Errorf("%w: there is %s", ErrPlatform, strings.Join(have, ", "))
	}
	m := d.Manifests[best]
	if err := checkDescriptor(m, maxDocument); err != nil {
		return m, err
	}
	return m, nil
}

func isManifest(mediaType string) bool {
	switch mediaType {
	case ocispec.MediaTypeImageManifest, dockerManifest, ocispec.MediaTypeImageIndex, dockerManifestList, "":
		return true
	}
	return false
}

func platformString(p ocispec.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

func checkDescriptor(d ocispec.Descriptor, limit int64) error {
	if err := checkDigest(d.Digest); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	if d.Size < 0 || d.Size > limit {
		return fmt.Errorf("%w: %s has %d bytes, the limit is %d", ErrUnsupported, d.Digest, d.Size, limit)
	}
	return nil
}

// maxBlob is the largest layer blob.
const maxBlob = 1 << 40

// parseManifest reads an image's manifest and refuses in words what is none.
func parseManifest(b []byte) (*document, error) {
	d, err := parseDocument(b, "")
	if err != nil {
		return nil, err
	}
	if d.isIndex() {
		return nil, fmt.Errorf("%w: an index where a manifest should be", ErrUnsupported)
	}
	switch d.Config.MediaType {
	case ocispec.MediaTypeImageConfig, dockerConfig:
	default:
		what := d.ArtifactType
		if what == "" {
			what = d.Config.MediaType
		}
		return nil, fmt.Errorf("%w: it is an OCI artifact of type %.100q, not a container image", ErrUnsupported, what)
	}
	if d.ArtifactType != "" {
		return nil, fmt.Errorf("%w: it is an OCI artifact of type %.100q, not a container image", ErrUnsupported, d.ArtifactType)
	}
	if err := checkDescriptor(*d.Config, maxDocument); err != nil {
		return nil, err
	}
	if len(d.Layers) > MaxLayers {
		return nil, fmt.Errorf("%w: %d layers, the limit is %d", ErrUnsupported, len(d.Layers), MaxLayers)
	}
	for i, l := range d.Layers {
		if err := checkLayerType(l.MediaType); err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(d.Layers), err)
		}
		if err := checkDescriptor(l, maxBlob); err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(d.Layers), err)
		}
	}
	return d, nil
}

func checkLayerType(t string) error {
	switch t {
	case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
		dockerLayer, dockerLayerGzip, dockerLayerZstd:
		return nil
	}
	switch {
	case strings.Contains(t, "+encrypted"):
		return fmt.Errorf("%w: it is encrypted (%.100q); decrypt the image first, with skopeo copy --decryption-key", ErrUnsupported, t)
	case strings.Contains(t, "nondistributable"), strings.HasPrefix(t, dockerForeign):
		return fmt.Errorf("%w: it is a foreign layer (%.100q), which its registry does not hold; such layers belong to Windows images", ErrUnsupported, t)
	}
	return fmt.Errorf("%w: media type %.100q is not known", ErrUnsupported, t)
}

// parseConfig reads an image configuration.
func parseConfig(b []byte) (Config, error) {
	var c Config
	if len(b) > maxDocument {
		return c, fmt.Errorf("%w: a configuration of %d bytes, the limit is %d", ErrUnsupported, len(b), maxDocument)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("%w: image configuration: %w", ErrUnsupported, err)
	}
	if c.RootFS.Type != "" && c.RootFS.Type != "layers" {
		return c, fmt.Errorf("%w: root file system of type %.100q", ErrUnsupported, c.RootFS.Type)
	}
	if len(c.RootFS.DiffIDs) > MaxLayers {
		return c, fmt.Errorf("%w: %d layers, the limit is %d", ErrUnsupported, len(c.RootFS.DiffIDs), MaxLayers)
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := checkDigest(d); err != nil {
			return c, fmt.Errorf("%w: diffID: %w", ErrUnsupported, err)
		}
	}
	return c, nil
}

// runs says whether an image of a configuration runs here: nil, or an ErrPlatform.
func runs(c *Config) error {
	if c.OS != "" && c.OS != "linux" || c.Architecture != "" && c.Architecture != "amd64" {
		return fmt.Errorf("%w: it is for %.100s", ErrPlatform, platformString(c.Platform))
	}
	return nil
}

// describe makes the OCI manifest of an image whose source has none.
func describe(config []byte, layers []ocispec.Descriptor, annotations map[string]string) ([]byte, error) {
	type manifest struct {
		SchemaVersion int                  `json:"schemaVersion"`
		MediaType     string               `json:"mediaType"`
		Config        ocispec.Descriptor   `json:"config"`
		Layers        []ocispec.Descriptor `json:"layers"`
		Annotations   map[string]string    `json:"annotations,omitempty"`
	}
	if layers == nil {
		layers = []ocispec.Descriptor{}
	}
	return json.Marshal(manifest{
		SchemaVersion: 2,
		MediaType:     ocispec.MediaTypeImageManifest,
		Config:        ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))},
		Layers:        layers,
		Annotations:   annotations,
	})
}
