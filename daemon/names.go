package daemon

import "math/rand/v2"

// Words of invented names: what a cradle and its guest may be.
var (
	manners = [...]string{
		"agile", "amber", "awake", "bold", "brave", "brisk", "bright", "calm", "candid", "clever", "cosy", "crisp", "daring", "deft",
		"eager", "early", "easy", "even", "fair", "fleet", "fond", "frank", "free", "fresh", "gentle", "glad", "golden", "grand", "happy",
		"hardy", "honest", "jolly", "keen", "kind", "late", "light", "lively", "loyal", "lucid", "merry", "mild", "neat", "nimble", "noble",
		"open", "patient", "plain", "plucky", "proud", "quick", "quiet", "ready", "robust", "round", "sane", "sharp", "silent", "sleek",
		"smart", "snug", "sober", "solid", "spry", "steady", "still", "stout", "sunny", "swift", "tidy", "trusty", "vivid", "warm", "wise", "witty",
	}
	guests = [...]string{
		"badger", "beaver", "bison", "bittern", "buzzard", "chamois", "cod", "crane", "cricket", "curlew", "deer", "dipper", "dolphin", "dove",
		"dunlin", "eagle", "eel", "egret", "elk", "falcon", "ferret", "finch", "fox", "gannet", "gecko", "goose", "grebe", "grouse", "gull",
		"hare", "hawk", "hedgehog", "heron", "hornet", "ibex", "jackdaw", "kestrel", "kite", "lapwing", "lark", "linnet", "lizard", "lynx",
		"magpie", "marten", "merlin", "mole", "newt", "nuthatch", "osprey", "otter", "owl", "perch", "petrel", "pike", "plover", "puffin",
		"rail", "raven", "robin", "salmon", "seal", "shrew", "siskin", "snipe", "sparrow", "stoat", "stork", "swan", "swift", "teal", "tern",
		"thrush", "toad", "trout", "vole", "wagtail", "weasel", "whale", "wren",
	}
)

// inventName makes a name of two words.
func inventName() string {
	return manners[rand.IntN(len(manners))] + "_" + guests[rand.IntN(len(guests))]
}
