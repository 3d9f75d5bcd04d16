package image

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// State is where a layer is on its way.
//
//	Waiting ─► Pulling ─► Done
//	   │         │ ▲
//	   │         ▼ │
//	   │       Retrying
//	   └─► Exists
//
// A pushed layer's: Waiting ─► Exists, Mounted, or Compressing ─► Pushing ─► Done.
type State string

// The states of a layer.
const (
	Waiting  State = "waiting"  // for a free slot, or for another process that works on the same layer
	Pulling  State = "pulling"  // read, verified and converted
	Retrying State = "retrying" // the source failed; it is asked again
	Exists   State = "exists"   // the store has it already; of a push: the registry has
	Done     State = "done"

	// Of a push.
	Compressing State = "compressing" // the store has not the blob that the registry wants
	Pushing     State = "pushing"     // sent to the registry
	Mounted     State = "mounted"     // the registry took it from another repository of its own; Message is that one's name
)

// Event tells of a pull's or a push's progress. With a zero Layer it is about the image.
type Event struct {
	Layer   digest.Digest // the layer's diffID
	Blob    digest.Digest // the layer as the source names it; what docker shows
	State   State
	Current int64 // bytes read from the source, or sent
	Total   int64 // bytes the source promised; zero if it did not say, or of a push if it is not known yet
	Message string
	Wait    time.Duration // with Retrying: until the next attempt
}
