package share

import (
	"github.com/hugelgupf/p9/fsimpl/templatefs"
	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"
)

// refuseAll is a directory in which nothing can be done.
type refuseAll struct {
	p9.DefaultWalkGetAttr
	templatefs.NoopFile
}

// Open refuses; the crossroads above the tree are only walked through.
func (refuseAll) Open(p9.OpenFlags) (p9.QID, uint32, error) { return p9.QID{}, 0, unix.EACCES }
