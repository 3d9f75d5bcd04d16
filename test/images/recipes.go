package images

import (
	"archive/tar"
	"embed"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// recipe says what an image is made of. Its layers are, oldest first: the parent's, one with what packages and script
// changed, one with files, and those that layers writes.
type recipe struct {
	name    string // required
	version string // raised when code behind the recipe changes what it makes
	parent  string // image it stands on; empty: none

	packages []string // Debian packages
	script   string   // run by sh in the root afterwards
	base     bool     // the root is made by debootstrap
	files    []file   // files of ours
	layers   func(h *host) ([]writeLayer, error)

	config v1.Config
	arch   string // as GOARCH has it; empty: amd64
	zstd   bool   // layers in the OCI layout are zstd, not gzip
}

// writeLayer writes the entries of one layer.
type writeLayer func(tw *tar.Writer) error

// file is one file of ours.
type file struct {
	Path string // in the image, without leading slash
	Mode int64  // permissions
	Body string // text
}

//go:embed files
var embedded embed.FS

func body(name string) string {
	b, err := embedded.ReadFile("files/" + name)
	if err != nil {
		panic("images: internal error: " + err.Error())
	}
	return string(b)
}

const pathEnv = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// recipes is the table of images. To add one, add a row; everything else follows from it.
func recipes() []*recipe {
	return []*recipe{
		{
			name:    "busybox",
			version: "1",
			layers:  busyboxLayers,
			config:  v1.Config{Env: []string{pathEnv}, Cmd: []string{"sh"}},
		},
		{
			name:    "busybox-bin",
			version: "2",
			layers:  busyboxBinLayers,
			config:  v1.Config{Env: []string{pathEnv}, Cmd: []string{"sh"}},
		},
		{
			// The demo's: a web server in a megabyte or two.
			name:   "demo",
			parent: "busybox",
			files: []file{
				{Path: "www/index.html", Mode: 0o644, Body: "Hello from a machine of its own.\n"},
			},
			config: v1.Config{
				Env:          []string{pathEnv},
				Cmd:          []string{"httpd", "-f", "-vv", "-p", "80", "-h", "/www"},
				ExposedPorts: map[string]struct{}{"80/tcp": {}},
			},
		},
		{
			name:    "debian",
			version: "2",
			base:    true,
			config:  v1.Config{Env: []string{pathEnv}, Cmd: []string{"bash"}},
		},
		{
			name:     "nginx",
			parent:   "debian",
			packages: []string{"nginx-light"},
			// Removing what the parent brought makes whiteouts, as images of the wild have them.
			script: `rm -rf /var/www/html/* /usr/share/pam /etc/nginx/sites-enabled/default
				ln -sf /dev/stdout /var/log/nginx/access.log
				ln -sf /dev/stderr /var/log/nginx/error.log`,
			files: []file{
				{Path: "etc/nginx/conf.d/site.conf", Mode: 0o644, Body: body("nginx.conf")},
				{Path: "usr/share/nginx/site/index.html", Mode: 0o644, Body: "<h1>Served from a cradle</h1>\n"},
			},
			config: v1.Config{
				Env:          []string{pathEnv},
				Cmd:          []string{"nginx", "-g", "daemon off;"},
				ExposedPorts: map[string]struct{}{"80/tcp": {}},
				StopSignal:   "SIGQUIT",
			},
		},
		{
			name:     "redis",
			parent:   "debian",
			packages: []string{"redis-server"},
			script:   `mkdir -p /data && chown redis:redis /data`,
			config: v1.Config{
				Env:          []string{pathEnv},
				Entrypoint:   []string{"redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data"},
				Cmd:          []string{"--appendonly", "yes"},
				ExposedPorts: map[string]struct{}{"6379/tcp": {}},
				User:         "redis",
				WorkingDir:   "/data",
				Volumes:      map[string]struct{}{"/data": {}},
			},
		},
		{
			name:     "web",
			parent:   "debian",
			packages: []string{"python3"},
			script:   `useradd --system --create-home --home-dir /srv/app --shell /usr/sbin/nologin app`,
			files:    []file{{Path: "srv/app/app.py", Mode: 0o644, Body: body("app.py")}},
			config: v1.Config{
				Env:          []string{pathEnv, "PYTHONUNBUFFERED=1"},
				Cmd:          []string{"python3", "app.py"},
				ExposedPorts: map[string]struct{}{"8080/tcp": {}},
				User:         "app",
				WorkingDir:   "/srv/app",
			},
			zstd: true,
		},
		{
			name:     "mariadb",
			parent:   "debian",
			packages: []string{"mariadb-server"},
			// The entrypoint makes the data directory, so that each container gets its own.
			script: `rm -rf /var/lib/mysql && install -d -o mysql -g mysql -m 0750 /var/lib/mysql
				install -d -o mysql -g mysql -m 0755 /run/mysqld
				rm -rf /var/log/mysql/*`,
			files: []file{
				{Path: "usr/local/bin/entrypoint", Mode: 0o755, Body: body("mariadb-entrypoint")},
				{Path: "usr/local/bin/healthcheck", Mode: 0o755, Body: body("mariadb-healthcheck")},
				{Path: "etc/mysql/mariadb.conf.d/99-container.cnf", Mode: 0o644, Body: body("mariadb.cnf")},
			},
			config: v1.Config{
				Env:          []string{pathEnv},
				Entrypoint:   []string{"entrypoint"},
				Cmd:          []string{"mariadbd"},
				ExposedPorts: map[string]struct{}{"3306/tcp": {}},
				Volumes:      map[string]struct{}{"/var/lib/mysql": {}},
				Healthcheck: &v1.HealthConfig{
					Test: []string{"CMD", "healthcheck"}, Interval: 5 * time.Second,
					Timeout: 20 * time.Second, StartPeriod: 2 * time.Minute, Retries: 3,
				},
			},
		},
		{
			name:    "odd",
			version: "3",
			parent:  "busybox",
			layers:  oddLayers,
			config:  v1.Config{Env: []string{pathEnv}, Cmd: []string{"sh"}},
		},
		{
			// With one layer more, the test's lister, it has 127.
			name:    "deep",
			version: "1",
			parent:  "busybox",
			layers:  deepLayers,
			config:  v1.Config{Env: []string{pathEnv}, Cmd: []string{"sh"}},
		},
		// A static program that prints a few lines, for this machine and for others.
		{name: "hello", version: helloVersion, layers: helloLayers("amd64"), config: helloConfig()},
		{name: "hello-arm64", version: helloVersion, layers: helloLayers("arm64"), config: helloConfig(), arch: "arm64"},
		{name: "hello-arm", version: helloVersion, layers: helloLayers("arm"), config: helloConfig(), arch: "arm"},
	}
}
