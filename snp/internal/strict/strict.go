// Package strict reads JSON documents that decide something: policies, references, evidence, pods. What encoding/json lets
// pass (a name that is unknown, stands twice or is spelled in other cases, null for a value) is an error that says where.
//
//	var p Policy // with json tags
//	err := strict.Decode(b, strict.Limits{Bytes: 1 << 20, Depth: 4, Entries: 4096}, &p)
//
// A document that Decode takes means to every reader of JSON what it means here.
package strict

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Limits bounds a document. All are required.
type Limits struct {
	Bytes   int // of the document
	Depth   int // objects and lists within each other
	Entries int // of one list or object
}

// Error says what is wrong with a document, and where.
type Error struct {
	Field  string // its path, such as guestPolicy.smt or chipIDs[2]; empty: the whole document
	Reason string
	Err    error // what Reason was made from; nil: nothing
}

// Error returns the field and the reason.
func (e *Error) Error() string {
	if e.Field == "" {
		return e.Reason
	}
	return e.Field + ": " + e.Reason
}

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// Faultf returns an Error.
func Faultf(field, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &Error{Field: field, Reason: err.Error(), Err: errors.Unwrap(err)}
}

// maxName bounds an unknown name that an error shows, in bytes.
const maxName = 64

// Decode reads the one JSON value of b into what v points to. Fields that the document leaves out keep their value; a
// struct's field with the tag strict:"required" may not be left out. A struct's fields need json tags; the types below v
// are structs, pointers, slices, maps with text keys, strings, bools, integers and encoding.TextUnmarshalers (which take
// strings). A slice or map that is there replaces the one before. Every error is an *Error.
func Decode(b []byte, l Limits, v any) error {
	if len(b) > l.Bytes {
		return Faultf("", "%d bytes, more than %d", len(b), l.Bytes)
	}
	if !utf8.Valid(b) {
		return Faultf("", "not UTF-8")
	}
	var whole json.RawMessage
	if err := json.Unmarshal(b, &whole); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			before := b[:min(int(syntax.Offset), len(b))]
			return Faultf("", "line %d: %w", 1+bytes.Count(before, []byte("\n")), err)
		}
		return Faultf("", "%w", err)
	}
	d := &decoder{Limits: l, tokens: json.NewDecoder(bytes.NewReader(b))}
	d.tokens.UseNumber()
	return d.value("", 0, reflect.ValueOf(v).Elem())
}

// decoder walks tokens and Go values side by side. The tokens are those of valid JSON.
type decoder struct {
	Limits
	tokens *json.Decoder
}

func (d *decoder) value(path string, depth int, v reflect.Value) error {
	t, err := d.tokens.Token()
	if err != nil {
		return Faultf(path, "%w", err)
	}
	return d.fill(path, depth, t, v)
}

// fill puts the value that token t begins into v.
func (d *decoder) fill(path string, depth int, t json.Token, v reflect.Value) error {
	switch u := v.Addr().Interface().(type) {
	case *Any:
		return d.skip(path, depth, t)
	case encoding.TextUnmarshaler:
		s, ok := t.(string)
		if !ok {
			return Faultf(path, "%s, want a string", kind(t))
		}
		if err := u.UnmarshalText([]byte(s)); err != nil {
			return Faultf(path, "%w", err)
		}
		return nil
	case interface{ oneOrMore() }:
		if t != json.Delim('[') {
			one := reflect.New(v.Type().Elem()).Elem()
			if err := d.fill(path, depth, t, one); err != nil {
				return err
			}
			v.Set(reflect.Append(reflect.Zero(v.Type()), one))
			return nil
		}
	}
	switch v.Kind() {
	case reflect.Pointer:
		inner := reflect.New(v.Type().Elem())
		if err := d.fill(path, depth, t, inner.Elem()); err != nil {
			return err
		}
		v.Set(inner)
		return nil
	case reflect.Struct:
		return d.object(path, depth+1, t, v)
	case reflect.Map:
		return d.table(path, depth+1, t, v)
	case reflect.Slice:
		return d.list(path, depth+1, t, v)
	case reflect.Bool:
		if b, ok := t.(bool); ok {
			v.SetBool(b)
			return nil
		}
		return Faultf(path, "%s, want true or false", kind(t))
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return number(path, t, v)
	case reflect.String:
		if s, ok := t.(string); ok {
			v.SetString(s)
			return nil
		}
	}
	return Faultf(path, "%s, want a string", kind(t))
}

// Any takes any value, null too, and keeps nothing of it. Names in it may not stand twice either.
type Any struct{}

func (d *decoder) skip(path string, depth int, t json.Token) error {
	next := func(at string) error {
		t, err := d.tokens.Token()
		if err != nil {
			return Faultf(at, "%w", err)
		}
		return d.skip(at, depth+1, t)
	}
	switch t {
	case json.Delim('{'):
		return d.names(path, depth+1, t, map[string]bool{}, func(_, at string) error { return next(at) })
	case json.Delim('['):
		return d.entries(path, depth+1, t, func(i int) error { return next(Entry(path, i)) })
	}
	return nil
}

// OneOrMore is a list; of one entry it may be written as that entry.
type OneOrMore[T any] []T

func (OneOrMore[T]) oneOrMore() {}

// number wants decimal digits: no exponent, no fraction.
func number(path string, t json.Token, v reflect.Value) error {
	n, ok := t.(json.Number)
	if !ok {
		return Faultf(path, "%s, want a number", kind(t))
	}
	if v.CanInt() {
		i, err := strconv.ParseInt(n.String(), 10, 64)
		if err != nil || v.OverflowInt(i) {
			return Faultf(path, "%s is no whole number of %d bits", n, v.Type().Bits())
		}
		v.SetInt(i)
		return nil
	}
	u, err := strconv.ParseUint(n.String(), 10, 64)
	if err != nil || v.OverflowUint(u) {
		return Faultf(path, "%s is no whole number of %d bits from 0 on", n, v.Type().Bits())
	}
	v.SetUint(u)
	return nil
}

func (d *decoder) object(path string, depth int, t json.Token, v reflect.Value) error {
	fields := map[string]int{}
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
		if name == "" {
			panic("strict: internal error: no json tag: " + v.Type().String() + "." + v.Type().Field(i).Name)
		}
		if name != "-" {
			fields[name] = i
		}
	}
	seen := map[string]bool{}
	err := d.names(path, depth, t, seen, func(name, at string) error {
		i, ok := fields[name]
		if !ok {
			return Faultf(at, "no such field")
		}
		return d.value(at, depth, v.Field(i))
	})
	if err != nil {
		return err
	}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Tag.Get("strict") == "required" && !seen[name] {
			return Faultf(below(path, name), "missing")
		}
	}
	return nil
}

func (d *decoder) table(path string, depth int, t json.Token, v reflect.Value) error {
	m := reflect.MakeMap(v.Type())
	err := d.names(path, depth, t, map[string]bool{}, func(name, at string) error {
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		if err := d.fill(at, depth, name, key); err != nil {
			return err
		}
		if m.MapIndex(key).IsValid() {
			return Faultf(at, "stands there twice")
		}
		if err := d.value(at, depth, value); err != nil {
			return err
		}
		m.SetMapIndex(key, value)
		return nil
	})
	if err == nil {
		v.Set(m)
	}
	return err
}

// names calls f for each name of the object that t begins, before its value; each may be there once.
func (d *decoder) names(path string, depth int, t json.Token, seen map[string]bool, f func(name, at string) error) error {
	if t != json.Delim('{') {
		return Faultf(path, "%s, want an object", kind(t))
	}
	if depth > d.Depth {
		return Faultf(path, "nested more than %d deep", d.Depth)
	}
	for d.tokens.More() {
		if len(seen) == d.Entries {
			return Faultf(path, "more than %d entries", d.Entries)
		}
		t, err := d.tokens.Token()
		if err != nil {
			return Faultf(path, "%w", err)
		}
		name := t.(string)
		at := below(path, name)
		if seen[name] {
			return Faultf(at, "stands there twice")
		}
		seen[name] = true
		if err := f(name, at); err != nil {
			return err
		}
	}
	_, err := d.tokens.Token()
	return err
}

func (d *decoder) list(path string, depth int, t json.Token, v reflect.Value) error {
	list := reflect.MakeSlice(v.Type(), 0, 0)
	err := d.entries(path, depth, t, func(i int) error {
		entry := reflect.New(v.Type().Elem()).Elem()
		if err := d.value(Entry(path, i), depth, entry); err != nil {
			return err
		}
		list = reflect.Append(list, entry)
		return nil
	})
	if err == nil {
		v.Set(list)
	}
	return err
}

// entries calls f for each entry of the list that t begins, before its value.
func (d *decoder) entries(path string, depth int, t json.Token, f func(i int) error) error {
	if t != json.Delim('[') {
		return Faultf(path, "%s, want a list", kind(t))
	}
	if depth > d.Depth {
		return Faultf(path, "nested more than %d deep", d.Depth)
	}
	for i := 0; d.tokens.More(); i++ {
		if i == d.Entries {
			return Faultf(path, "more than %d entries", d.Entries)
		}
		if err := f(i); err != nil {
			return err
		}
	}
	_, err := d.tokens.Token()
	return err
}

// Entry returns the path of an entry of the list at path.
func Entry(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

// below returns the path of a name in the object at path.
func below(path, name string) string {
	if len(name) > maxName {
		name = strings.ToValidUTF8(name[:maxName], "") + "…"
	}
	if name == "" || strconv.Quote(name) != `"`+name+`"` {
		name = strconv.Quote(name)
	}
	if path == "" {
		return name
	}
	return path + "." + name
}

func kind(t json.Token) string {
	switch t {
	case json.Delim('{'):
		return "an object"
	case json.Delim('['):
		return "a list"
	}
	switch t.(type) {
	case nil:
		return "null"
	case bool:
		return "true or false"
	case json.Number:
		return "a number"
	}
	return "a string"
}
