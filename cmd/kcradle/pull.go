package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	"github.com/kcradle/kcradle/image"
)

// sourceOptions are the flags of the verbs that bring images into the store.
type sourceOptions struct {
	Quiet     bool
	Platform  string
	PlainHTTP []string
	KeepBlobs bool
	Parallel  int
	MaxLayer  string
}

func (o *sourceOptions) flags(f *pflag.FlagSet) {
	f.BoolVarP(&o.Quiet, "quiet", "q", false, "no progress")
	f.StringVar(&o.Platform, "platform", image.Platform, "the image's `platform`; machines are linux/amd64 only")
	f.BoolVar(&o.KeepBlobs, "keep-blobs", false, "keep the compressed layers, too, to push or save the image with the same digests")
	f.StringVar(&o.MaxLayer, "max-layer-size", "", "what one layer may unpack to (default 64 GiB, and 200 times its size where that is more than 4 GiB)")
}

func (o *sourceOptions) registryFlags(f *pflag.FlagSet) {
	f.StringSliceVar(&o.PlainHTTP, "plain-http", nil, "`HOST[:PORT]` of a registry to speak to without TLS")
	f.IntVar(&o.Parallel, "parallel", 0, "layers at a time (default 4)")
}

// plainHTTPVariable names registries that are spoken to without TLS, separated by commas.
const plainHTTPVariable = "KCRADLE_PLAIN_HTTP"

// withPlainHTTP are these registries and those of the environment.
func withPlainHTTP(hosts []string) []string {
	for h := range strings.SplitSeq(os.Getenv(plainHTTPVariable), ",") {
		if h = strings.TrimSpace(h); h != "" {
			hosts = append(hosts, h)
		}
	}
	return hosts
}

// pullOptions are the store's options for the flags.
func (o *sourceOptions) pullOptions(policy image.Policy) (image.PullOptions, error) {
	p := image.PullOptions{
		Platform: o.Platform, Policy: policy, PlainHTTP: withPlainHTTP(o.PlainHTTP), KeepBlobs: o.KeepBlobs, Parallel: o.Parallel,
	}
	if o.MaxLayer != "" {
		n, err := units.RAMInBytes(o.MaxLayer)
		if err != nil || n <= 0 {
			return p, usageError{fmt.Errorf("invalid argument %q for \"--max-layer-size\" flag: want a size such as 10g", o.MaxLayer)}
		}
		p.Limits.Bytes = n
	}
	return p, nil
}

type pullOptions struct {
	sourceOptions
	Policy string
	Images []string
}

func newPull(a *app) *cobra.Command {
	var o pullOptions
	cmd := &cobra.Command{
		Use:   "pull [flags] IMAGE…",
		Short: "Bring images into the store",
		Long: `pull brings images into the store and prints their digests. An IMAGE is written as

  NAME[:TAG][@DIGEST]          the docker daemon's image if it has it, else the registry's
  docker://NAME…               the registry's
  docker+http://HOST/NAME…     the registry's, without TLS
  docker-daemon:NAME           the docker daemon's
  containerd:NAME              a containerd's ($CONTAINERD_ADDRESS, $CONTAINERD_NAMESPACE)
  docker-archive:FILE[:NAME]   out of what docker save wrote
  oci:DIR[:REF]                out of an OCI layout
  oci-archive:FILE[:REF]       out of an OCI layout in a tar file

Layers that are there already are not fetched again; what an interrupted pull fetched is used by the next one.
Credentials are docker's (docker login). Registries are spoken to with TLS unless they are named with docker+http://,
--plain-http or $` + plainHTTPVariable + `.`,
		Example: `  kcradle pull debian:12
  kcradle pull --plain-http registry.lan:5000 registry.lan:5000/team/app:1.4
  kcradle pull docker-daemon:app oci-archive:/srv/tool.tar`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeImages(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Images = args
			return pull(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	o.flags(f)
	o.registryFlags(f)
	f.StringVar(&o.Policy, "policy", string(image.Always), "when to ask a registry: always, missing or never")
	return cmd
}

func pull(ctx context.Context, a *app, o pullOptions) error {
	refs := make([]image.Reference, len(o.Images))
	for i, name := range o.Images {
		var err error
		if refs[i], err = image.ParseReference(name); err != nil {
			return usageError{err}
		}
	}
	store, err := image.Open(a.Root, a.Log)
	if err != nil {
		return err
	}
	opts, err := o.pullOptions(image.Policy(o.Policy))
	if err != nil {
		return err
	}
	for _, ref := range refs {
		img, err := pullShown(ctx, a, store, ref, opts, o.Quiet)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(a.Stdout, "%s@%s\n", img.Ref, img.Digest); err != nil {
			return err
		}
	}
	return nil
}

// pullShown pulls with progress on the error stream.
func pullShown(ctx context.Context, a *app, store *image.Store, ref image.Reference, o image.PullOptions, quiet bool) (*image.Image, error) {
	p := newProgress(a.Stderr, ref.Familiar(), quiet)
	o.Progress = p.event
	img, err := store.Pull(ctx, ref, o)
	p.close()
	return img, err
}

// progress shows a pull: bars on a terminal, lines elsewhere.
type progress struct {
	event func(image.Event)
	close func()
}

func newProgress(w io.Writer, name string, quiet bool) progress {
	if quiet {
		return progress{func(image.Event) {}, func() {}}
	}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return newBars(f, name)
	}
	return newLines(w, name)
}

// shortID is a layer as docker's pull shows it.
func shortID(d digest.Digest) string {
	if s := d.Encoded(); len(s) > 12 {
		return s[:12]
	}
	return string(d)
}

// stateWords are docker's.
var stateWords = map[image.State]string{
	image.Waiting: "Waiting", image.Pulling: "Pulling", image.Retrying: "Retrying", image.Exists: "Already exists", image.Done: "Pull complete",
}

// newLines says each change of a layer's state in a line.
func newLines(w io.Writer, name string) progress {
	states := map[digest.Digest]image.State{}
	return progress{
		event: func(e image.Event) {
			if e.Layer == "" {
				fmt.Fprintf(w, "%s: %s\n", name, e.Message)
				return
			}
			if states[e.Layer] == e.State && e.Message == "" {
				return
			}
			states[e.Layer] = e.State
			line := shortID(e.Blob) + ": " + stateWords[e.State]
			if e.State == image.Pulling && e.Total > 0 {
				line += " " + units.HumanSize(float64(e.Total))
			}
			if e.Message != "" {
				line += ": " + e.Message
			}
			fmt.Fprintln(w, line)
		},
		close: func() {},
	}
}

// newBars draws a bar for each layer that is fetched, and the last message above them.
func newBars(f *os.File, name string) progress {
	type bar struct {
		*mpb.Bar
		mu    sync.Mutex
		state string
	}
	p := mpb.New(mpb.WithOutput(f), mpb.WithWidth(40))
	bars := map[digest.Digest]*bar{}
	return progress{
		event: func(e image.Event) {
			if e.Layer == "" {
				fmt.Fprintf(p, "%s: %s\n", name, e.Message)
				return
			}
			b := bars[e.Layer]
			if b == nil {
				b = &bar{}
				b.Bar = p.AddBar(e.Total,
					mpb.PrependDecorators(decor.Name(shortID(e.Blob)+" "), decor.Any(func(decor.Statistics) string {
						b.mu.Lock()
						defer b.mu.Unlock()
						return b.state
					}, decor.WC{W: 16, C: decor.DindentRight})),
					mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f")))
				bars[e.Layer] = b
			}
			b.mu.Lock()
			b.state = stateWords[e.State]
			b.mu.Unlock()
			switch e.State {
			case image.Exists, image.Done:
				b.SetTotal(max(e.Total, 1), false)
				b.SetCurrent(max(e.Total, 1))
				b.EnableTriggerComplete()
			case image.Retrying:
				fmt.Fprintf(p, "%s: %s\n", shortID(e.Blob), e.Message)
			default:
				// The end is said by Done alone: the last byte is not yet the layer.
				b.SetCurrent(min(e.Current, max(e.Total-1, 0)))
			}
		},
		close: func() {
			for _, b := range bars {
				if !b.Completed() {
					b.Abort(false)
				}
			}
			p.Wait()
		},
	}
}

// completeImages completes the names of images in the store.
func completeImages(a *app) completion {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		root := a.Root
		if root == "" {
			root = defaultRoot()
		}
		if _, err := os.Stat(root); err != nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		store, err := image.Open(root, nil)
		if err != nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		images, err := store.List(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		var out []string
		for _, img := range images {
			out = append(out, familiar(img.Ref))
		}
		return out, cobra.ShellCompDirectiveDefault
	}
}

// familiar is an image's name as docker shows it.
func familiar(name string) string {
	if ref, err := image.ParseReference(name); err == nil && ref.Transport() == image.Any {
		return ref.Familiar()
	}
	return name
}

// findImages finds every image that the words name, each once.
func findImages(ctx context.Context, store *image.Store, words []string) ([]*image.Image, error) {
	var out []*image.Image
	var errs []error
	seen := map[string]bool{}
	for _, w := range words {
		found, err := store.Find(ctx, w)
		errs = append(errs, err)
		for _, img := range found {
			if !seen[img.Ref] {
				seen[img.Ref] = true
				out = append(out, img)
			}
		}
	}
	return out, errors.Join(errs...)
}
