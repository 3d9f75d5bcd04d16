package disk

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe" // the device mapper's ioctls take the address of one buffer

	"golang.org/x/sys/unix"
)

// The device mapper's interface, linux/dm-ioctl.h: every call is an ioctl on /dev/mapper/control with a struct dm_ioctl,
// for DM_TABLE_LOAD followed by a struct dm_target_spec and its parameters.
const (
	dmControl = "/dev/mapper/control"

	dmHeaderSize = 312
	dmSpecSize   = 40
	dmNameSize   = 128

	dmOffVersion     = 0
	dmOffDataSize    = 12
	dmOffDataStart   = 16
	dmOffTargetCount = 20
	dmOffFlags       = 28
	dmOffDev         = 40
	dmOffName        = 48

	dmReadOnly = 1 << 0

	// _IOWR(0xfd, n, struct dm_ioctl)
	dmDevCreate  = 0xc138fd03
	dmDevRemove  = 0xc138fd04
	dmDevSuspend = 0xc138fd06 // and, without the flag for it, resume
	dmTableLoad  = 0xc138fd09
)

// header fills in what every call needs.
func header(b []byte, name string) error {
	if len(name) >= dmNameSize {
		return fmt.Errorf("device name %q is too long", name)
	}
	binary.NativeEndian.PutUint32(b[dmOffVersion:], 4)
	binary.NativeEndian.PutUint32(b[dmOffDataSize:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[dmOffDataStart:], dmHeaderSize)
	copy(b[dmOffName:], name)
	return nil
}

func call(f *os.File, op string, nr uintptr, b []byte) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), nr, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return os.NewSyscallError(op, errno)
	}
	return nil
}

// linearTable is the buffer of DM_TABLE_LOAD for one linear target; start and length are sectors.
func linearTable(name, backing string, start, length int64, access Access) ([]byte, error) {
	params := fmt.Sprintf("%s %d\x00", backing, start)
	size := dmHeaderSize + dmSpecSize + (len(params)+7)&^7
	b := make([]byte, size)
	if err := header(b, name); err != nil {
		return nil, err
	}
	binary.NativeEndian.PutUint32(b[dmOffTargetCount:], 1)
	if access == ReadOnly {
		binary.NativeEndian.PutUint32(b[dmOffFlags:], dmReadOnly)
	}
	spec := b[dmHeaderSize:]
	binary.NativeEndian.PutUint64(spec[0:], 0)                          // first sector
	binary.NativeEndian.PutUint64(spec[8:], uint64(length))             // sectors
	binary.NativeEndian.PutUint32(spec[20:], uint32(size-dmHeaderSize)) // next target
	copy(spec[24:], "linear")
	copy(spec[dmSpecSize:], params)
	return b, nil
}

func createLinear(name, backing string, start, length int64, access Access) (minor uint32, err error) {
	f, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("open the device mapper: %w (the kernel needs CONFIG_BLK_DEV_DM)", err)
	}
	defer f.Close()
	b := make([]byte, dmHeaderSize)
	if err := header(b, name); err != nil {
		return 0, err
	}
	if err := call(f, "DM_DEV_CREATE", dmDevCreate, b); err != nil {
		return 0, err
	}
	dev := binary.NativeEndian.Uint64(b[dmOffDev:])
	table, err := linearTable(name, backing, start, length, access)
	if err != nil {
		return 0, err
	}
	if err := call(f, "DM_TABLE_LOAD", dmTableLoad, table); err != nil {
		return 0, err
	}
	b = make([]byte, dmHeaderSize)
	if err := header(b, name); err != nil {
		return 0, err
	}
	if err := call(f, "DM_DEV_SUSPEND", dmDevSuspend, b); err != nil {
		return 0, err
	}
	return unix.Minor(dev), nil
}

func removeDevice(name string) error {
	f, err := os.OpenFile(dmControl, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, dmHeaderSize)
	if err := header(b, name); err != nil {
		return err
	}
	return call(f, "DM_DEV_REMOVE", dmDevRemove, b)
}
