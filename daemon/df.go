package daemon

import (
	"net/http"
	"time"

	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/volume"

	"github.com/kcradle/kcradle/dockerapi"
)

// usage is GET /system/df as versions up to 1.50 have it.
type usage struct {
	LayersSize  int64
	Images      []imagetypes.Summary
	Containers  []map[string]any
	Volumes     []volume.Volume
	BuildCache  []struct{}
	BuilderSize int64 `json:",omitempty"`
}

// diskUsage tells what takes the disk.
func (d *Daemon) diskUsage(w http.ResponseWriter, r *dockerapi.Request) error {
	var out usage // what is not asked for is null
	wanted := func(kind string) bool {
		kinds := r.Form["type"]
		if len(kinds) == 0 {
			return true
		}
		for _, k := range kinds {
			if k == kind {
				return true
			}
		}
		return false
	}
	if wanted("image") {
		all, err := d.cfg.Store.Images(r.Context())
		if err != nil {
			return err
		}
		out.Images = []imagetypes.Summary{}
		for _, u := range all {
			s := summarizeImage(u)
			s.SharedSize, s.Containers = u.Shared, int64(len(d.imageUsers(u.ID)))
			out.Images = append(out.Images, s)
		}
		// What several images share is there once.
		use, err := d.cfg.Store.Usage(r.Context())
		if err != nil {
			return err
		}
		out.LayersSize = use.Bytes
	}
	if wanted("container") {
		now := time.Now()
		out.Containers = []map[string]any{}
		for _, c := range d.all() {
			s := c.summary(c.look(), now, r.Version)
			s["SizeRw"] = c.diskUse()
			out.Containers = append(out.Containers, s)
		}
	}
	if wanted("build-cache") {
		out.BuildCache = []struct{}{}
	}
	if wanted("volume") {
		all, err := d.allVolumes()
		if err != nil {
			return err
		}
		out.Volumes = []volume.Volume{}
		for _, v := range all {
			v.UsageData = &volume.UsageData{Size: blocks(d.volumePath(v.Name)), RefCount: int64(len(d.users(v.Name)))}
			out.Volumes = append(out.Volumes, v)
		}
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}
