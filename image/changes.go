package image

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-connections/nat"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// RunConfig is what an image says of its containers: the member "config" of its configuration.
type RunConfig = dockerspec.DockerOCIImageConfig

// ErrChange says that a change of docker import or docker commit is not one.
var ErrChange = errors.New("invalid change")

const maxChanges = 1 << 20 // bytes of all of them, and of all variables that are put into them

// ApplyChanges returns a configuration changed by Dockerfile instructions, as docker import and docker commit take
// them: CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME, WORKDIR. Variables in
// them are those of the configuration. ErrChange for anything else.
func ApplyChanges(c RunConfig, changes []string) (RunConfig, error) {
	text := strings.Join(changes, "\n")
	if strings.TrimSpace(text) == "" {
		return c, nil
	}
	if len(text) > maxChanges {
		return c, fmt.Errorf("%w: %d bytes of them, the limit is %d", ErrChange, len(text), maxChanges)
	}
	file, err := parser.Parse(bytes.NewReader([]byte(text)))
	if err != nil {
		return c, fmt.Errorf("%w: %w", ErrChange, err)
	}
	a := changer{c: c, lex: shell.NewLex(file.EscapeToken)}
	// The caller's stays what it is.
	a.c.Env, a.c.OnBuild = slices.Clone(c.Env), slices.Clone(c.OnBuild)
	a.c.Labels, a.c.Volumes, a.c.ExposedPorts = maps.Clone(c.Labels), maps.Clone(c.Volumes), maps.Clone(c.ExposedPorts)
	for _, node := range file.AST.Children {
		// Before the instruction is looked at: those of a build have nothing to say here.
		switch name := strings.ToLower(node.Value); name {
		case "cmd", "entrypoint", "env", "expose", "healthcheck", "label", "onbuild", "stopsignal", "user", "volume", "workdir":
		default:
			return c, fmt.Errorf("%w: %.100s is not a valid change command", ErrChange, name)
		}
		if err := a.apply(node); err != nil {
			return c, fmt.Errorf("%w: %.200s: %w", ErrChange, node.Original, err)
		}
	}
	return a.c, nil
}

// changer is a configuration while it is changed.
type changer struct {
	c      RunConfig
	put    int // bytes of variables that were put into words
	lex    *shell.Lex
	cmdSet bool // by one of the changes
}

func (a *changer) apply(node *parser.Node) error {
	cmd, err := instructions.ParseCommand(node)
	if err != nil {
		return err
	}
	env := variables{shell.EnvsFromSlice(a.c.Env), &a.put}
	if e, ok := cmd.(instructions.SupportsSingleWordExpansion); ok {
		err := e.Expand(func(word string) (string, error) {
			out, _, err := a.lex.ProcessWord(word, env)
			return out, err
		})
		if err != nil {
			return err
		}
	}
	if a.put > maxChanges {
		return fmt.Errorf("more than %d bytes of variables", maxChanges)
	}
	switch i := cmd.(type) {
	case *instructions.CmdCommand:
		a.c.Cmd, a.cmdSet = a.commandLine(i.ShellDependantCmdLine), true
	case *instructions.EntrypointCommand:
		a.c.Entrypoint = a.commandLine(i.ShellDependantCmdLine)
		if !a.cmdSet { // the image's are arguments for another entrypoint
			a.c.Cmd = nil
		}
	case *instructions.EnvCommand:
		for _, v := range i.Env {
			a.setEnv(v.Key, v.Value)
		}
	case *instructions.ExposeCommand:
		return a.expose(i.Ports, env)
	case *instructions.HealthCheckCommand:
		a.c.Healthcheck = i.Health
	case *instructions.LabelCommand:
		if a.c.Labels == nil {
			a.c.Labels = map[string]string{}
		}
		for _, v := range i.Labels {
			a.c.Labels[v.Key] = v.Value
		}
	case *instructions.OnbuildCommand:
		a.c.OnBuild = append(a.c.OnBuild, i.Expression)
	case *instructions.StopSignalCommand:
		if !isSignal(i.Signal) {
			return fmt.Errorf("there is no signal %.40q", i.Signal)
		}
		a.c.StopSignal = i.Signal
	case *instructions.UserCommand:
		a.c.User = i.User
	case *instructions.VolumeCommand:
		if a.c.Volumes == nil {
			a.c.Volumes = map[string]struct{}{}
		}
		for _, v := range i.Volumes {
			if v = strings.TrimSpace(v); v == "" {
				return errors.New("a volume without a path")
			}
			a.c.Volumes[v] = struct{}{}
		}
	case *instructions.WorkdirCommand:
		a.c.WorkingDir = path.Join("/", a.c.WorkingDir, i.Path)
		if path.IsAbs(i.Path) {
			a.c.WorkingDir = path.Clean(i.Path)
		}
	}
	return nil
}

// variables counts what they give: a few instructions can double a value more often than memory allows.
type variables struct {
	shell.EnvGetter
	put *int
}

// Get implements shell.EnvGetter.
func (v variables) Get(name string) (string, bool) {
	value, ok := v.EnvGetter.Get(name)
	if *v.put += len(value); *v.put > maxChanges {
		return "", ok
	}
	return value, ok
}

// commandLine is a command as it is written to a configuration: what is no JSON array is the shell's.
func (a *changer) commandLine(line instructions.ShellDependantCmdLine) []string {
	if !line.PrependShell {
		return line.CmdLine
	}
	sh := a.c.Shell
	if len(sh) == 0 {
		sh = []string{"/bin/sh", "-c"}
	}
	return append(slices.Clone(sh), line.CmdLine...)
}

func (a *changer) setEnv(key, value string) {
	for i, e := range a.c.Env {
		if k, _, _ := strings.Cut(e, "="); k == key {
			a.c.Env[i] = key + "=" + value
			return
		}
	}
	a.c.Env = append(a.c.Env, key+"="+value)
}

func (a *changer) expose(words []string, env shell.EnvGetter) error {
	var specs []string
	for _, w := range words {
		ports, err := a.lex.ProcessWords(w, env)
		if err != nil {
			return err
		}
		specs = append(specs, ports...)
	}
	if a.put > maxChanges {
		return fmt.Errorf("more than %d bytes of variables", maxChanges)
	}
	ports, _, err := nat.ParsePortSpecs(specs)
	if err != nil {
		return err
	}
	if a.c.ExposedPorts == nil {
		a.c.ExposedPorts = map[string]struct{}{}
	}
	for p := range ports {
		a.c.ExposedPorts[string(p)] = struct{}{}
	}
	return nil
}

// isSignal knows signals by name, with or without SIG, and by number.
func isSignal(s string) bool {
	const last = 64
	if n, err := strconv.Atoi(s); err == nil {
		return n > 0 && n <= last
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	for _, base := range []string{"RTMIN", "RTMAX"} {
		rest, ok := strings.CutPrefix(name, base)
		if !ok {
			continue
		}
		if rest == "" {
			return true
		}
		n, err := strconv.Atoi(rest[1:])
		return err == nil && n >= 0 && n <= 30 && rest[0] == map[string]byte{"RTMIN": '+', "RTMAX": '-'}[base]
	}
	return unix.SignalNum("SIG"+name) != 0
}
