package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/kcradle/kcradle/vmm/qmp"
)

// command is one command of QEMU's control protocol.
type command struct {
	name      string
	arguments any
}

type capability struct {
	Name string `json:"capability"`
	On   bool   `json:"state"`
}

// The memory stays in its file: only the devices' state goes through the stream. Events tell of the end.
var migrationCapabilities = command{"migrate-set-capabilities", struct {
	Capabilities []capability `json:"capabilities"`
}{[]capability{{"x-ignore-shared", true}, {"events", true}}}}

type uri struct {
	URI string `json:"uri"`
}

// incoming is what a restored machine's QEMU is told first.
func incoming(config Config) []command {
	for i, f := range config.files() {
		if f.role == "state" {
			return []command{migrationCapabilities, {"migrate-incoming", uri{fmt.Sprintf("fd:%d", firstFile+i)}}}
		}
	}
	return nil
}

// Snapshot waits until the guest waits for a host, stops the machine for good, and writes the state of its devices to a new file. With the file of
// Config.MemoryFile that is a Snapshot, once the machine was killed and has ended. The guest goes on from it in every
// machine that is restored, as if nothing had happened in between.
func (m *Machine) Snapshot(ctx context.Context, state string) (err error) {
	c, err := m.QMP(ctx)
	if err != nil {
		return err
	}
	if err := m.channel.Rest(ctx); err != nil {
		return fmt.Errorf("snapshot: %w", m.explain(err))
	}
	f, err := os.OpenFile(state, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// Not stopped before: the state would say so, and the machine would not go on by itself.
	if err := c.Execute(ctx, migrationCapabilities.name, migrationCapabilities.arguments, nil); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if err := c.ExecuteWithFile(ctx, "getfd", struct {
		Name string `json:"fdname"`
	}{"state"}, f, nil); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if err := c.Execute(ctx, "migrate", uri{"fd:state"}, nil); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	for {
		select {
		case status := <-m.migration:
			switch status {
			case "completed":
				return nil
			case "failed", "cancelled":
				return fmt.Errorf("snapshot: QEMU says that it %s", status)
			}
		case <-m.done:
			return fmt.Errorf("snapshot: %w", &ExitError{m.exit})
		case <-ctx.Done():
			return fmt.Errorf("snapshot: %w", context.Cause(ctx))
		}
	}
}

// Stop makes the guest's processors stand still; Continue lets them go on. Connections stay.
func (m *Machine) Stop(ctx context.Context) error { return m.execute(ctx, "stop", nil) }

// Continue is the end of Stop.
func (m *Machine) Continue(ctx context.Context) error { return m.execute(ctx, "cont", nil) }

func (m *Machine) execute(ctx context.Context, name string, arguments any) error {
	c, err := m.QMP(ctx)
	if err != nil {
		return err
	}
	return c.Execute(ctx, name, arguments, nil)
}

// Attach puts a drive's contents behind the device of the same serial, while the machine runs or stands still; what was
// there is let go. The guest does not notice: it must not have anything of the device in use or in its cache.
func (m *Machine) Attach(ctx context.Context, d Drive) error {
	c, err := m.QMP(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(m.drives, func(o Drive) bool { return o.Serial == d.Serial })
	if i < 0 || m.drives[i].ReadOnly != d.ReadOnly {
		return fmt.Errorf("attach drive %s: the machine has no such device", d.Serial)
	}
	m.attach.Lock()
	defer m.attach.Unlock()
	old, sets, blank := m.nodes[i], m.sets[i], m.drives[i].Blank
	name := m.spare[i]
	m.sets[i] = nil
	if !d.Blank || name == "" {
		if name, err = m.addNode(ctx, c, i, d); err != nil {
			return fmt.Errorf("attach drive %s: %w", d.Serial, err)
		}
	}
	if err := c.Execute(ctx, "qom-set", property{fmt.Sprintf("blk%d", i), "drive", name}, nil); err != nil {
		return fmt.Errorf("attach drive %s: %w", d.Serial, err)
	}
	m.nodes[i], m.drives[i] = name, d
	if blank { // for the next time that there is to be nothing
		m.spare[i] = old
		return nil
	}
	if err := c.Execute(ctx, "blockdev-del", struct {
		Name string `json:"node-name"`
	}{old}, nil); err != nil {
		return fmt.Errorf("let go of the former contents of drive %s: %w", d.Serial, err)
	}
	for _, set := range sets {
		if err := c.Execute(ctx, "remove-fd", fdSet{set}, nil); err != nil {
			return fmt.Errorf("let go of the former files of drive %s: %w", d.Serial, err)
		}
	}
	return nil
}

// fdSet names a set of QEMU's descriptors.
type fdSet struct {
	Set int `json:"fdset-id"`
}

// addNode makes a block node of a drive's contents and returns its name.
func (m *Machine) addNode(ctx context.Context, c *qmp.Client, i int, d Drive) (string, error) {
	m.attached++
	set := m.attached * maxFiles
	for n, f := range d.files(i) {
		file, err := d.open(f, set+n)
		if err == nil {
			m.sets[i] = append(m.sets[i], set+n)
			err = c.ExecuteWithFile(ctx, "add-fd", fdSet{set + n}, file, nil)
			_ = file.Close()
		}
		if err != nil {
			return "", err
		}
	}
	name := fmt.Sprintf("a%d", m.attached)
	return name, c.Execute(ctx, "blockdev-add", d.node(name, set), nil)
}

// maxFiles is how many descriptor sets each drive that is attached may use; Start's have numbers below.
const maxFiles = 1000
