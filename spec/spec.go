// Package spec is the contract between host and guest: what the owner of a pod asked for ([Pod]), what the
// host assigned ([Placement]), and every name, port and frame that both sides must spell alike.
//
// It imports the standard library and the OCI runtime-spec types, nothing else:
//
//	pod, err := spec.ParsePod(bytes)   // strict: unknown fields and newer versions are refused
//	digest := spec.PodDigest(bytes)    // what an attested command line carries
package spec

import (
	"crypto/sha256"
	"encoding/hex"
	"strconv"
)

// Ports that the guest listens on. Over AF_VSOCK they are vsock ports; over virtio-serial every stream
// begins with its port number.
const (
	PortVdocker uint32 = 1 // the Docker Engine API
	PortControl uint32 = 2 // launch, output, state, stop: frames of control.go
	PortShare   uint32 = 3 // directories of the host: each stream is two bytes of ShareHeader, then 9P2000.L with the host as server
)

// ShareHeader opens a stream on PortShare: the index in Pod.Binds of the mount it serves, big endian.
const ShareHeader = 2

// Names that QEMU's command line and the guest must spell alike.
const (
	ChannelPortName = "kcradle.channel.0" // virtio-serial port of the control channel
	SerialLayers    = "layers"            // virtio-blk serial of the flat concatenation of all layers
	SerialScratch   = "scratch"           // virtio-blk serial of the writable disk
	SerialVolumes   = "volumes"           // virtio-blk serial of the concatenation of volumes too many for a device each
)

// Directories at the top of the writable disks. The host makes them with the disk, because the guest's kernel would spread such over
// the whole of it; the guest makes those that it does not find.
const (
	ScratchContainers = "c"     // for each container, by its ID: what it has written
	ScratchLogs       = "logs"  // for each container, by its ID: its log
	VolumeData        = "_data" // of a volume: what is mounted into containers
)

// VolumeSerial is the virtio-blk serial of the i-th volume disk (at most 20 bytes, virtio's limit).
func VolumeSerial(i int) string { return "volume" + strconv.Itoa(i) }

// PodDigest is the digest of a pod document: SHA-256 of its exact bytes, as "sha256:<64 hex digits>".
func PodDigest(podJSON []byte) string {
	sum := sha256.Sum256(podJSON)
	return "sha256:" + hex.EncodeToString(sum[:])
}
