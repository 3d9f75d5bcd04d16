// Command kcradle starts docker containers in small virtual machines of their own.
//
//	kcradle summon /tmp/vm mariadb
//	kcradle run /tmp/vm
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/snp/verify"
)

func main() {
	// What whoever started this has left open is not for QEMU or for mkfs. (Before Linux 5.11 they get it.)
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	os.Exit(realMain(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// realMain is main without a process around it.
func realMain(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	// The first signal asks, and the verb cleans up; the second one kills. run has its own manners.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	return execute(ctx, &app{Stdin: stdin, Stdout: stdout, Stderr: stderr, Now: time.Now, Roots: verify.AMD()}, args)
}

// execute runs the verb that args name.
func execute(ctx context.Context, a *app, args []string) int {
	root := newRoot(a)
	root.SetArgs(args)
	root.SetIn(a.Stdin)
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	cmd, err := root.ExecuteContextC(ctx)
	return exitCode(cmd, err, a.Stderr)
}

// Exit codes, docker's.
const (
	exitOwnFailure = 125 // run, exec: kcradle itself failed
	exitNotExec    = 126 // the container's command cannot be executed
	exitNotFound   = 127 // the container's command was not found
)

// exitError ends kcradle with a code. With err there is something to say, too.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}
func (e *exitError) Unwrap() error { return e.err }

// exitCode is the one place where errors become exit codes.
func exitCode(cmd *cobra.Command, err error, stderr io.Writer) int {
	if err == nil {
		return 0
	}
	name := "kcradle"
	if cmd != nil && cmd.HasParent() {
		name = cmd.CommandPath()
	}
	var coded *exitError
	if errors.As(err, &coded) {
		if coded.err != nil {
			fmt.Fprintf(stderr, "%s: %v\n", name, coded.err)
		}
		return coded.code
	}
	fmt.Fprintf(stderr, "%s: %v\n", name, err)
	if errors.As(err, new(usageError)) {
		fmt.Fprintf(stderr, "See '%s --help'.\n", name)
	}
	if cmd != nil && (cmd.Name() == "run" || cmd.Name() == "exec") {
		return exitOwnFailure
	}
	if isAttestation(cmd) {
		return attestationCode(err)
	}
	return 1
}

// usageError is a mistake in the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// Groups of verbs in the help.
const (
	groupPod         = "pod"
	groupImage       = "image"
	groupAttestation = "attestation"
	groupHost        = "host"
)

func newRoot(a *app) *cobra.Command {
	var level, format string
	root := &cobra.Command{
		Use:   "kcradle",
		Short: "Start docker containers in small virtual machines of their own",
		Long: `kcradle starts any docker container in its own small virtual machine.

summon turns an image into a bundle, a directory that holds everything the container needs; run starts it. While it
runs, the docker client works on it too: see kcradle env.

Environment:
  KCRADLE_ROOT        the state directory, as --root
  KCRADLE_PACKAGES    where the machine packages are (default: beside the program, ../lib/kcradle, /usr/lib/kcradle)
  KCRADLE_TEMPLATES   how much disk machines at rest may take (default 2GiB), or off: see kcradle template
  DOCKER_HOST, DOCKER_CONFIG, CONTAINERD_ADDRESS, CONTAINERD_NAMESPACE    where images come from, as docker and ctr have it
  KCRADLE_PLAIN_HTTP  registries that may be spoken to without TLS`,
		Example: `  kcradle summon /tmp/vm mariadb -e MARIADB_ROOT_PASSWORD=secret -p 3306:3306
  kcradle run /tmp/vm
  eval $(kcradle env /tmp/vm) && docker ps`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       buildInfo().Version,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(a.Stderr, level, format)
			if err != nil {
				return usageError{err}
			}
			a.Log = log
			if a.Root == "" {
				a.Root = defaultRoot()
			}
			a.Root, err = filepath.Abs(a.Root)
			return err
		},
	}
	root.SetVersionTemplate("kcradle {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddGroup(&cobra.Group{ID: groupPod, Title: "Pods:"}, &cobra.Group{ID: groupImage, Title: "Images:"},
		&cobra.Group{ID: groupAttestation, Title: "Attestation (AMD SEV-SNP):"}, &cobra.Group{ID: groupHost, Title: "This host:"})
	root.SetHelpCommandGroupID(groupHost)
	root.SetCompletionCommandGroupID(groupHost)
	pf := root.PersistentFlags()
	pf.StringVar(&a.Root, "root", os.Getenv("KCRADLE_ROOT"), "state `directory`: images, caches, the list of bundles (default "+defaultRoot()+")")
	pf.StringVar(&level, "log-level", "warn", "what to log: debug, info, warn or error")
	pf.StringVar(&format, "log-format", "text", "how to log: text or json")
	_ = root.MarkPersistentFlagDirname("root")

	for _, v := range verbs() {
		cmd := v.new(a)
		cmd.GroupID = v.group
		wrapArgs(cmd)
		root.AddCommand(cmd)
	}
	return root
}

// verb is a row of the table of verbs.
type verb struct {
	group string
	new   func(*app) *cobra.Command
}

// wrapArgs makes complaints about arguments usage errors.
func wrapArgs(cmd *cobra.Command) {
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	for _, c := range cmd.Commands() {
		wrapArgs(c)
	}
}

func newLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("invalid argument %q for \"--log-level\" flag: want debug, info, warn or error", level)
	}
	opts := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("invalid argument %q for \"--log-format\" flag: want text or json", format)
}

// defaultRoot is where state lives: the system's place for root, the user's own for others.
func defaultRoot() string {
	if os.Geteuid() == 0 {
		return "/var/lib/kcradle"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "kcradle")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return filepath.Join(os.TempDir(), fmt.Sprintf("kcradle-%d", os.Geteuid()))
	}
	return filepath.Join(home, ".local/share/kcradle")
}

// packagesDir is where the machine packages are installed: $KCRADLE_PACKAGES, beside the binary (an installed tree or
// a build directory), or the system's place.
func packagesDir() string {
	if dir := os.Getenv("KCRADLE_PACKAGES"); dir != "" {
		return dir
	}
	const system = "/usr/lib/kcradle"
	self, err := os.Executable()
	if err != nil {
		return system
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	bin := filepath.Dir(self)
	for _, dir := range []string{bin, filepath.Join(bin, "../lib/kcradle"), filepath.Join(bin, "../build")} {
		if _, err := os.Stat(filepath.Join(dir, "pkg-default")); err == nil {
			return filepath.Clean(dir)
		}
	}
	return system
}

// splitTarget splits DIR[:CONTAINER]. A directory that exists under the whole name wins.
func splitTarget(s string) (dir, container string) {
	if _, err := os.Stat(s); err == nil {
		return s, ""
	}
	if i := strings.LastIndexByte(s, ':'); i > 0 && !strings.Contains(s[i:], "/") {
		return s[:i], s[i+1:]
	}
	return s, ""
}
