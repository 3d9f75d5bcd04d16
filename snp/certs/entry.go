package certs

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
)

// maxEntries bounds a listing, against a directory that is no cache.
const maxEntries = 100_000

// Names of files, see the package comment.
const (
	nameChain = "cert_chain.pem"
	nameCRL   = "crl.der"
)

// fileName returns where an object lies below the cache's directory, with slashes. Precondition: it is valid.
func fileName(o kds.Object) string {
	dir := strings.ToLower(o.Signer.String()) + "/" + o.Line.String() + "/"
	switch o.Kind {
	case kds.KindChain:
		return dir + nameChain
	case kds.KindCRL:
		return dir + nameCRL
	}
	fmc := ""
	if o.TCB.Layout == snp.LayoutTurin {
		fmc = fmt.Sprintf("fmc%02d-", o.TCB.FMC)
	}
	return fmt.Sprintf("%s%x/%sbl%02d-tee%02d-snp%02d-ucode%02d.der", dir, o.HWID(), fmc, o.TCB.Bootloader, o.TCB.TEE, o.TCB.SNP, o.TCB.Microcode)
}

// parseFileName is the inverse of fileName.
func parseFileName(name string) (kds.Object, error) {
	o, err := scanFileName(name)
	if err != nil || o.Validate() != nil || fileName(o) != name {
		return kds.Object{}, errors.New("it does not belong into a certificate cache (remove it)")
	}
	return o, nil
}

// scanFileName takes more than fileName makes.
func scanFileName(name string) (o kds.Object, err error) {
	parts := strings.Split(name, "/")
	if len(parts) < 3 || len(parts) > 4 {
		return o, errors.New("depth")
	}
	signer := snp.SignerVCEK
	if parts[0] == "vlek" {
		signer = snp.SignerVLEK
	}
	line, err := snp.ParseLine(parts[1])
	if err != nil {
		return o, err
	}
	if len(parts) == 3 {
		if parts[2] == nameChain {
			return kds.Chain(line, signer), nil
		}
		return kds.CRL(line, signer), nil
	}
	hwid, err := hex.DecodeString(parts[2])
	if err != nil || len(hwid) != line.HWIDSize() {
		return o, errors.New("chip")
	}
	t := snp.TCB{Layout: line.Layout()}
	format, fields := "bl%d-tee%d-snp%d-ucode%d.der", []any{&t.Bootloader, &t.TEE, &t.SNP, &t.Microcode}
	if t.Layout == snp.LayoutTurin {
		format, fields = "fmc%d-"+format, append([]any{&t.FMC}, fields...)
	}
	if _, err := fmt.Sscanf(parts[3], format, fields...); err != nil {
		return o, err
	}
	var id [64]byte
	copy(id[:], hwid)
	return kds.VCEK(line, id, t), nil
}

// Entry is one file of a cache.
type Entry struct {
	Path    string     // below the cache's directory, with slashes
	Object  kds.Object // zero if the path names none
	Issued  time.Time  // since when the certificate, or both of a chain, or the list is valid
	Expires time.Time  // until when
	Fetched time.Time  // zero: somebody handed it in
	Err     error      // why it is of no use: not what its name says, not valid now, revoked; nil: it is
}

// Entries lists the files of the cache in the order of their names, and checks each. It asks no upstream.
func (c *Cache) Entries(ctx context.Context) ([]Entry, error) {
	alone := c.alone()
	var out []Entry
	err := filepath.WalkDir(c.config.Dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			if name == c.config.Dir && errors.Is(err, fs.ErrNotExist) {
				return nil // nothing was stored yet
			}
			return err
		}
		if err := ctx.Err(); err != nil || d.IsDir() {
			return err
		}
		if len(out) == maxEntries {
			return fmt.Errorf("%s has more than %d files: is it a certificate cache?", c.config.Dir, maxEntries)
		}
		rel, err := filepath.Rel(c.config.Dir, name)
		if err != nil {
			return err
		}
		out = append(out, alone.entry(ctx, filepath.ToSlash(rel)))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("certs: %w", err)
	}
	return out, nil
}

func (c *Cache) entry(ctx context.Context, name string) Entry {
	e := Entry{Path: name}
	if strings.HasPrefix(path.Base(name), ".tmp-") {
		e.Err = errors.New("it was left by an interrupted write (remove it)")
		return e
	}
	if e.Object, e.Err = parseFileName(name); e.Err != nil {
		return e
	}
	it, err := c.current(ctx, e.Object)
	e.Issued, e.Expires, e.Fetched, e.Err = it.issued, it.expires, it.fetched, err
	return e
}

// Current says why what is in the directory under an object's name is of no use now; nil: it is. It asks no upstream.
func (c *Cache) Current(ctx context.Context, o kds.Object) error {
	_, err := c.alone().current(ctx, o)
	return err
}

// alone returns the cache without an upstream.
func (c *Cache) alone() *Cache {
	config := c.config
	config.Upstream = nil
	return &Cache{config: config}
}

func (c *Cache) current(ctx context.Context, o kds.Object) (item, error) {
	above, err := c.above(ctx, o)
	if err != nil {
		return item{}, err
	}
	it, err := c.load(o, above)
	if err != nil {
		return item{}, err
	}
	now := c.config.Now()
	switch {
	case now.Before(it.issued):
		err = fmt.Errorf("it is not valid before %s", it.issued.Format(time.RFC3339))
	case it.expires.IsZero():
		err = errors.New("it does not say until when it is valid")
	case now.After(it.expires):
		err = fmt.Errorf("it has expired on %s", it.expires.Format(time.RFC3339))
	case o.Kind == kds.KindChain:
		err = c.revoked(ctx, o)
	}
	return it, err
}

// revoked says whether the list beside a chain revokes one of its certificates.
func (c *Cache) revoked(ctx context.Context, o kds.Object) error {
	chain, err := c.above(ctx, kds.CRL(o.Line, o.Signer))
	if err != nil {
		return err
	}
	crl, err := c.load(kds.CRL(o.Line, o.Signer), chain)
	if err != nil {
		return nil // the list's own entry says so, if there is one
	}
	list, err := chain.ParseCRL(crl.body)
	if err != nil {
		return err
	}
	return chain.CheckRevoked(list)
}
