package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

// A volume is the directory ROOT/volumes/NAME with its disk and what is known of it.
const (
	volumeDisk = "disk.ext4"
	volumeFile = "volume.json"
)

// anonymousLabel is docker's mark of a volume that nobody has named.
const anonymousLabel = "com.docker.volume.anonymous"

// volumeRecord is volume.json.
type volumeRecord struct {
	Version   int               `json:"version"`
	Created   time.Time         `json:"created"`
	Labels    map[string]string `json:"labels,omitempty"`
	Options   map[string]string `json:"options,omitempty"`
	Anonymous bool              `json:"anonymous,omitempty"`
}

// volumeVersion is the version of volume.json. History: 1: first version.
const volumeVersion = 1

func (d *Daemon) volumePath(name string) string {
	return filepath.Join(d.cfg.Root, volumesDir, name, volumeDisk)
}

// ensureVolume returns the disk of a volume, and makes it where there is none; made says that it was not there before.
func (d *Daemon) ensureVolume(ctx context.Context, v volumeUse) (made bool, path string, err error) {
	path = d.volumePath(v.name)
	if _, err := os.Stat(path); err == nil {
		return false, path, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, "", err
	}
	size := int64(0)
	for key, value := range v.options {
		if key != "size" {
			return false, "", dockerapi.BadRequest("invalid option: %q", key)
		}
		if size, err = units.RAMInBytes(value); err != nil || size <= 0 {
			return false, "", dockerapi.BadRequest("invalid size %q of a volume", value)
		}
	}
	raw, err := json.MarshalIndent(volumeRecord{Version: volumeVersion, Created: time.Now().UTC(), Labels: v.labels, Options: v.options, Anonymous: v.anonymous}, "", "  ")
	if err != nil {
		return false, "", err
	}
	dir := filepath.Dir(path)
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "."+v.name+".tmp-*")
	if err != nil {
		return false, "", err
	}
	defer os.RemoveAll(tmp) // after the rename there is nothing of that name
	err = os.Chmod(tmp, 0o711)
	if err == nil {
		err = os.WriteFile(filepath.Join(tmp, volumeFile), append(raw, '\n'), 0o600)
	}
	if err == nil {
		err = bundle.NewVolume(ctx, filepath.Join(d.cfg.Root, "cache"), filepath.Join(tmp, volumeDisk), size)
	}
	if err != nil {
		return false, "", err
	}
	if err := os.Rename(tmp, dir); errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) { // somebody was faster
		return false, path, nil
	} else if err != nil {
		return false, "", err
	}
	d.events.publish(daemonEvent(events.VolumeEventType, events.ActionCreate, v.name, map[string]string{"driver": localDriver}))
	return true, path, nil
}

func (d *Daemon) removeVolume(name string) error {
	dir := filepath.Join(d.cfg.Root, volumesDir, name)
	dead := filepath.Join(d.cfg.Root, volumesDir, "."+name+".rm-"+newID()[:8])
	if err := os.Rename(dir, dead); err != nil { // first the name: half a volume is never seen under it
		return err
	}
	d.events.publish(daemonEvent(events.VolumeEventType, events.ActionDestroy, name, map[string]string{"driver": localDriver}))
	return os.RemoveAll(dead)
}

// volumeOf reads a volume.
func (d *Daemon) volumeOf(name string) (volume.Volume, volumeRecord, error) {
	var rec volumeRecord
	if volumeName(name) != nil {
		return volume.Volume{}, rec, dockerapi.NotFound("get %s: no such volume", name)
	}
	raw, err := os.ReadFile(filepath.Join(d.cfg.Root, volumesDir, name, volumeFile))
	if errors.Is(err, fs.ErrNotExist) {
		return volume.Volume{}, rec, dockerapi.NotFound("get %s: no such volume", name)
	}
	if err == nil {
		err = json.Unmarshal(raw, &rec)
	}
	if err != nil {
		return volume.Volume{}, rec, err
	}
	if rec.Version > volumeVersion {
		return volume.Volume{}, rec, dockerapi.Errorf(http.StatusInternalServerError, "volume %s: version %d: %w", name, rec.Version, spec.ErrNewer)
	}
	return volume.Volume{Name: name, Driver: localDriver, Mountpoint: d.volumePath(name), Scope: "local", Labels: rec.Labels,
		Options: rec.Options, CreatedAt: rec.Created.Format(time.RFC3339)}, rec, nil
}

// allVolumes are sorted by their names.
func (d *Daemon) allVolumes() ([]volume.Volume, error) {
	entries, err := os.ReadDir(filepath.Join(d.cfg.Root, volumesDir))
	if err != nil {
		return nil, err
	}
	out := []volume.Volume{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		v, _, err := d.volumeOf(e.Name())
		if dockerapi.Status(err) == http.StatusNotFound { // it has just gone
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// users of a volume are the containers that mount it, by ID.
func (d *Daemon) users(name string) []string {
	var out []string
	for _, c := range d.all() {
		if slices.ContainsFunc(c.b.Pod.Volumes, func(v spec.Volume) bool { return v.Name == name }) {
			out = append(out, c.id)
		}
	}
	slices.Sort(out)
	return out
}

func (d *Daemon) volumeCreate(w http.ResponseWriter, r *dockerapi.Request) error {
	var q volume.CreateRequest
	if err := dockerapi.ReadJSON(r, &q, false); err != nil {
		return err
	}
	if q.Driver != "" && q.Driver != localDriver {
		return dockerapi.NotFound("create %s: error looking up volume plugin %s: plugin %q not found: volumes are disks of this host (driver local)", q.Name, q.Driver, q.Driver)
	}
	use := volumeUse{name: q.Name, labels: q.Labels, options: q.DriverOpts, anonymous: q.Name == ""}
	if use.name == "" {
		use.name = newID()
		use.labels = maps.Clone(use.labels)
		if use.labels == nil {
			use.labels = map[string]string{}
		}
		use.labels[anonymousLabel] = ""
	}
	if err := volumeName(use.name); err != nil {
		return err
	}
	if _, old, err := d.volumeOf(use.name); err == nil && len(q.DriverOpts) > 0 && !maps.Equal(old.Options, q.DriverOpts) {
		return dockerapi.Conflict("a volume %s with other options is there already", use.name)
	}
	if _, _, err := d.ensureVolume(context.WithoutCancel(r.Context()), use); err != nil {
		return err
	}
	v, _, err := d.volumeOf(use.name)
	if err != nil {
		return err
	}
	return dockerapi.WriteJSON(w, http.StatusCreated, v)
}

func (d *Daemon) volumeInspect(w http.ResponseWriter, r *dockerapi.Request) error {
	v, _, err := d.volumeOf(r.Var("name"))
	if err != nil {
		return err
	}
	return dockerapi.WriteJSON(w, http.StatusOK, v)
}

func (d *Daemon) volumes(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "dangling", "driver", "label", "name")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return err
	}
	all, err := d.allVolumes()
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(v volume.Volume) bool {
		return len(f["dangling"]) > 0 && dangling != (len(d.users(v.Name)) == 0) || !f.Labels("label", v.Labels) ||
			!f.Match("name", v.Name) || !f.Exact("driver", v.Driver)
	})
	return dockerapi.WriteJSON(w, http.StatusOK, struct {
		Volumes  []volume.Volume
		Warnings []string
	}{all, nil})
}

func (d *Daemon) volumeRemove(w http.ResponseWriter, r *dockerapi.Request) error {
	name := r.Var("name")
	if _, _, err := d.volumeOf(name); err != nil {
		if r.Bool("force") && dockerapi.Status(err) == http.StatusNotFound {
			return noContent(w)
		}
		return err
	}
	if users := d.users(name); len(users) > 0 {
		return dockerapi.Conflict("remove %s: volume is in use - [%s]", name, strings.Join(users, ", "))
	}
	if err := d.removeVolume(name); err != nil {
		return err
	}
	return noContent(w)
}

// volumePrune removes the volumes that no container has: the anonymous ones, and with the filter all the others, too.
func (d *Daemon) volumePrune(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "label", "label!", "all")
	if err != nil {
		return err
	}
	every, err := f.Bool("all", r.Version < 42)
	if err != nil {
		return err
	}
	all, err := d.allVolumes()
	if err != nil {
		return err
	}
	report := volume.PruneReport{VolumesDeleted: []string{}}
	for _, v := range all {
		_, rec, err := d.volumeOf(v.Name)
		excluded := slices.ContainsFunc(f["label!"], func(l string) bool { return dockerapi.Filters{"label": {l}}.Labels("label", v.Labels) })
		if err != nil || !every && !rec.Anonymous || len(d.users(v.Name)) > 0 || excluded || !f.Labels("label", v.Labels) {
			continue
		}
		n := blocks(d.volumePath(v.Name))
		if err := d.removeVolume(v.Name); err != nil {
			return err
		}
		report.VolumesDeleted = append(report.VolumesDeleted, v.Name)
		report.SpaceReclaimed += uint64(n)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, report)
}

func noVolumeDriver(name string) error {
	return dockerapi.NotFound("error looking up volume plugin %s: plugin %q not found: volumes are disks of this host (driver local)", name, name)
}
