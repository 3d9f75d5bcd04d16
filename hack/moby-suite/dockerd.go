package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// asDockerd is the argument with which this program starts a daemon of ours for a test that believes to start dockerd.
const asDockerd = "as-dockerd"

// dockerdFlag says what a flag of dockerd's means to a daemon of ours.
type dockerdFlag struct {
	flag bool   // it has no value, unless behind "="
	ours string // the same flag of ours; empty: it goes without saying
	only string // the one value that goes without saying; empty: any
}

// dockerdFlags are those that the suite gives. A flag that is not here has no counterpart: its test fails and says so.
var dockerdFlags = map[string]dockerdFlag{
	"data-root":         {ours: "--root"},
	"host":              {ours: "--host"},
	"pidfile":           {ours: "--pidfile"},
	"insecure-registry": {ours: "--insecure-registry"},
	"host-gateway-ip":   {ours: "--host-gateway-ip"},
	"tlsverify":         {flag: true, ours: "--tlsverify"},
	"tlscacert":         {ours: "--tlscacert"},
	"tlscert":           {ours: "--tlscert"},
	"tlskey":            {ours: "--tlskey"},

	"live-restore":                 {flag: true, only: "true"}, // containers never need the daemon
	"exec-root":                    {},
	"containerd":                   {},
	"containerd-namespace":         {},
	"containerd-plugins-namespace": {},
	"userland-proxy":               {flag: true},
	"iptables":                     {flag: true}, // no rule is ever made
	"ip6tables":                    {flag: true},
	"debug":                        {flag: true, ours: "--log-level"},
	"log-level":                    {},
	"storage-driver":               {only: "overlay2"},
	"default-cgroupns-mode":        {only: "private"},
	"default-ipc-mode":             {only: "private"},
	"experimental":                 {flag: true},
}

// configFlag names a file, which is empty unless a test has written one.
const configFlag = "config-file"

// dockerdShort are dockerd's short flags.
var dockerdShort = map[string]string{"H": "host", "D": "debug", "l": "log-level", "p": "pidfile", "s": "storage-driver", "g": "data-root"}

// daemonArgs are the arguments of `kcradle` for those of dockerd.
func daemonArgs(args []string) (out []string, err error) {
	root, debug := "", false
	var flags []string
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		name, value, joined := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if !strings.HasPrefix(arg, "-") {
			return nil, fmt.Errorf("argument %q: dockerd has flags alone", arg)
		}
		if !strings.HasPrefix(arg, "--") {
			if long, ok := dockerdShort[name]; ok {
				name = long
			}
		}
		f, ok := dockerdFlags[name]
		if !ok && name != configFlag {
			return nil, fmt.Errorf("kcradle daemon has nothing like dockerd's flag --%s", name)
		}
		switch {
		case joined:
		case f.flag:
			value = "true"
		case len(args) == 0:
			return nil, fmt.Errorf("flag --%s needs a value", name)
		default:
			value, args = args[0], args[1:]
		}
		switch {
		case name == configFlag:
			if b, err := os.ReadFile(value); err != nil || strings.Trim(string(b), "{} \n") != "" {
				return nil, errors.Join(err, fmt.Errorf("kcradle daemon has no configuration file, and %s is not empty", value))
			}
		case f.only != "" && value != f.only:
			return nil, fmt.Errorf("kcradle daemon has nothing like dockerd's --%s=%s", name, value)
		case f.ours == "--root":
			root = value
		case name == "debug":
			debug = value == "true"
		case f.ours != "":
			flags = append(flags, f.ours+"="+value)
		}
	}
	if root == "" {
		return nil, errors.New("dockerd was started without --data-root")
	}
	level := "warn"
	if debug {
		level = "debug"
	}
	return append([]string{"--root", root, "--log-level", level, "daemon"}, flags...), nil
}

// beDockerd becomes the daemon that program is.
func beDockerd(program string, args []string) error {
	ours, err := daemonArgs(args)
	if err != nil {
		return err
	}
	return syscall.Exec(program, append([]string{program}, ours...), os.Environ())
}
