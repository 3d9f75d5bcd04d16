package daemon

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/kcradle/kcradle/dockerapi"
)

// FindBundle is the bundle of a container below a state directory, by its name, its ID or the beginning of that. It asks no daemon.
func FindBundle(root, ref string) (string, error) {
	dir := filepath.Join(root, containersDir)
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		return "", err
	}
	var begins []string
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.Name() == ref {
			return path, nil
		}
		if strings.Contains(e.Name(), ".") { // half made, or half removed
			continue
		}
		var r struct{ Name string }
		raw, err := os.ReadFile(filepath.Join(path, recordFile))
		if err == nil && json.Unmarshal(raw, &r) == nil && r.Name == trimSlash(ref) {
			return path, nil
		}
		if ref != "" && strings.HasPrefix(e.Name(), ref) {
			begins = append(begins, path)
		}
	}
	switch len(begins) {
	case 0:
		return "", dockerapi.NotFound("%s is no bundle, and no container of %s has that name or ID (docker ps -a shows them)", ref, root)
	case 1:
		return begins[0], nil
	}
	return "", fmt.Errorf("%d containers have an ID that begins with %s: use more of it", len(begins), ref)
}
