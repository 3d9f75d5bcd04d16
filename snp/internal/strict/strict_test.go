package strict

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// color is text.
type color uint8

func (c *color) UnmarshalText(b []byte) error {
	for i, name := range []string{"red", "green"} {
		if string(b) == name {
			*c = color(i + 1)
			return nil
		}
	}
	return errColor
}

func (c color) MarshalText() ([]byte, error) { return []byte([]string{"none", "red", "green"}[c]), nil }

var errColor = errors.New("want red or green")

type inner struct {
	On    bool  `json:"on"`
	Level uint8 `json:"level" strict:"required"`
}

type outer struct {
	Version int               `json:"version" strict:"required"`
	Text    string            `json:"text,omitempty"`
	Inner   inner             `json:"inner"`
	Pointer *inner            `json:"pointer,omitempty"`
	List    []color           `json:"list,omitempty"`
	Map     map[color]inner   `json:"map,omitempty"`
	Names   OneOrMore[string] `json:"names,omitempty"`
	Bytes   Bytes             `json:"bytes,omitempty"`
	Rest    Any               `json:"rest"`
	Own     string            `json:"-"`
}

var limits = Limits{Bytes: 400, Depth: 4, Entries: 9}

func TestDecode(t *testing.T) {
	v := outer{Version: 7, Text: "before", List: []color{1, 2, 1}, Own: "own"}
	err := Decode([]byte(`{"version": 1, "inner": {"level": 255, "on": true}, "pointer": {"level": 0}, "list": ["green"],
		"map": {"red": {"level": 1}}, "names": "one", "bytes": "00ff", "rest": [null, {"a": [1.5e3, true]}]}`), limits, &v)
	if err != nil {
		t.Fatal(err)
	}
	want := outer{
		Version: 1, Text: "before", Inner: inner{On: true, Level: 255}, Pointer: &inner{}, List: []color{2},
		Map: map[color]inner{1: {Level: 1}}, Names: OneOrMore[string]{"one"}, Bytes: Bytes{0, 255}, Own: "own",
	}
	if !reflect.DeepEqual(v, want) {
		t.Errorf("got %+v, want %+v", v, want)
	}
	if err := Decode([]byte(`{"version":2,"names":["a","b"]}`), limits, &v); err != nil || len(v.Names) != 2 {
		t.Errorf("got %v, %v", v.Names, err)
	}
}

func TestRefusals(t *testing.T) {
	tests := []struct{ name, document, want string }{
		{"nothing", ``, "unexpected end"},
		{"white space", " \n", "line 2: unexpected end"},
		{"syntax", "{\n\"version\": 1,\n}", "line 3: invalid character '}'"},
		{"something behind it", `{"version":1} {}`, "line 1: invalid character '{' after"},
		{"not UTF-8", "{\"version\":1,\"text\":\"\xff\"}", "not UTF-8"},
		{"too long", `{"version":1}` + strings.Repeat(" ", 400), "413 bytes, more than 400"},
		{"a list", `[]`, "a list, want an object"},
		{"null", `null`, "null, want an object"},
		{"missing", `{}`, "version: missing"},
		{"missing below", `{"version":1,"pointer":{}}`, "pointer.level: missing"},
		{"missing in a map", `{"version":1,"map":{"red":{}}}`, "map.red.level: missing"},
		{"unknown", `{"version":1,"colour":1}`, "colour: no such field"},
		{"unknown below", `{"version":1,"inner":{"level":1,"of":true}}`, "inner.of: no such field"},
		{"other case", `{"Version":1}`, "Version: no such field"},
		{"not a name", `{"version":1,"a\nb":1}`, `"a\nb": no such field`},
		{"no name", `{"version":1,"":1}`, `"": no such field`},
		{"long name", `{"version":1,"` + strings.Repeat("é", 80) + `":1}`, strings.Repeat("é", 32) + "…: no such field"},
		{"twice", `{"version":1,"version":1}`, "version: stands there twice"},
		{"twice, once escaped", `{"version":1,"versio\u006e":1}`, "version: stands there twice"},
		{"twice in a map", `{"version":1,"map":{"red":{"level":1},"red":{"level":2}}}`, "map.red: stands there twice"},
		{"twice in the rest", `{"version":1,"rest":[{"a":1,"a":2}]}`, "rest[0].a: stands there twice"},
		{"own field", `{"version":1,"-":"x"}`, "-: no such field"},
		{"null for a struct", `{"version":1,"inner":null}`, "inner: null, want an object"},
		{"null for a pointer", `{"version":1,"pointer":null}`, "pointer: null, want an object"},
		{"null for a list", `{"version":1,"list":null}`, "list: null, want a list"},
		{"null for a string", `{"version":1,"text":null}`, "text: null, want a string"},
		{"null for a bool", `{"version":1,"inner":{"level":1,"on":null}}`, "inner.on: null, want true or false"},
		{"number for a string", `{"version":1,"text":1}`, "text: a number, want a string"},
		{"number for text", `{"version":1,"list":[1]}`, "list[0]: a number, want a string"},
		{"object for a string", `{"version":1,"text":{}}`, "text: an object, want a string"},
		{"string for a bool", `{"version":1,"inner":{"level":1,"on":"true"}}`, "inner.on: a string, want true or false"},
		{"string for a number", `{"version":"1"}`, "version: a string, want a number"},
		{"bool for a list", `{"version":1,"list":true}`, "list: true or false, want a list"},
		{"numbers for bytes", `{"version":1,"bytes":[1,2]}`, "bytes: a list, want a string"},
		{"null for one or more", `{"version":1,"names":null}`, "names: null, want a string"},
		{"null among one or more", `{"version":1,"names":[null]}`, "names[0]: null, want a string"},
		{"wrong text", `{"version":1,"list":["green","blue"]}`, "list[1]: want red or green"},
		{"wrong key", `{"version":1,"map":{"blue":{"level":1}}}`, "map.blue: want red or green"},
		{"fraction", `{"version":1.0}`, "version: 1.0 is no whole number"},
		{"exponent", `{"version":1e0}`, "version: 1e0 is no whole number"},
		{"too large", `{"version":1,"inner":{"level":256}}`, "inner.level: 256 is no whole number of 8 bits from 0 on"},
		{"negative", `{"version":1,"inner":{"level":-1}}`, "inner.level: -1 is no whole number of 8 bits from 0 on"},
		{"beyond 64 bits", `{"version":99999999999999999999}`, "no whole number of 64 bits"},
		{"odd digits", `{"version":1,"bytes":"abc"}`, "bytes: 3 hexadecimal digits are no whole bytes"},
		{"upper case", `{"version":1,"bytes":"AB"}`, `bytes: 'A' after 0 characters`},
		{"base64", `{"version":1,"bytes":"q80="}`, `bytes: 'q' after 0 characters`},
		{"too many entries", `{"version":1,"list":["red","red","red","red","red","red","red","red","red","red"]}`, "list: more than 9 entries"},
		{"too many names", `{"version":1,"rest":{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1,"g":1,"h":1,"i":1,"j":1}}`, "rest: more than 9 entries"},
		{"too deep", `{"version":1,"rest":[[[[]]]]}`, "rest[0][0][0]: nested more than 4 deep"},
		{"too deep in objects", `{"version":1,"rest":{"a":{"a":{"a":{}}}}}`, "rest.a.a.a: nested more than 4 deep"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var v outer
			err := Decode([]byte(tt.document), limits, &v)
			var e *Error
			if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), tt.want) && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
		})
	}
	var v outer
	if err := Decode([]byte(`{"version":1,"list":["blue"]}`), limits, &v); !errors.Is(err, errColor) {
		t.Errorf("got %v, want it to wrap the reason", err)
	}
}

// FuzzDecode holds what is taken against encoding/json: it must read the same.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"version":1,"inner":{"level":3,"on":true},"list":["red"],"map":{"green":{"level":1}},"rest":{"x":[null]}}`))
	f.Add([]byte(`{"version":1,"version":2}`))
	f.Add([]byte(`{"version":1,"text":"\ud800"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var ours, theirs outer
		if Decode(b, limits, &ours) != nil {
			return
		}
		if json.Unmarshal(b, &theirs) != nil {
			return // a list of one name as a string
		}
		if theirs.Names == nil {
			theirs.Names = ours.Names
		}
		if a, b := fmt.Sprintf("%+v", ours), fmt.Sprintf("%+v", theirs); ours.Pointer == nil && a != b {
			t.Errorf("got %s, encoding/json %s", a, b)
		}
	})
}
