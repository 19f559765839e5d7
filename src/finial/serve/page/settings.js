// What the person has set: sampling and the system prompt for good, the API key for as long as the tab is open.
// Knows the form and the browser's storage; nothing of the conversation.
//
//   bindSettings(); options(); apiKey();

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const KEPT = "finial.settings";
const KEY = "finial.key";
const $ = (id) => document.getElementById(id);

function read(storage, name) {
  try {
    return storage()?.getItem(name) ?? "";
  } catch {
    return ""; // storage is switched off: settings last as long as the page
  }
}

function write(storage, name, value) {
  try {
    if (value) storage().setItem(name, value);
    else storage().removeItem(name);
  } catch {
    // as above
  }
}

const local = () => window.localStorage;
const session = () => window.sessionStorage;

export const apiKey = () => $("key").value.trim();

/** Fields of a request as they are set; what is left to the server is not there.  `system` is the prompt's text. */
export function options() {
  const set = { system: $("system").value.trim() };
  for (const name of NUMBERS) {
    const field = $(name);
    if (field.value !== "" && field.validity.valid) set[name === "max_tokens" ? "max_completion_tokens" : name] = field.valueAsNumber;
  }
  if (!$("thinking").checked && !$("thinking").hidden) set.chat_template_kwargs = { enable_thinking: false };
  return set;
}

/** Whether the model can think: if not, there is nothing to switch. */
export function knowThinking(can) {
  $("thinking").hidden = $("thinking-label").hidden = !can;
}

export function bindSettings() {
  let kept = {};
  try {
    kept = JSON.parse(read(local, KEPT) || "{}");
  } catch {
    // written by something else: start from the defaults
  }
  for (const name of [...NUMBERS, "system"]) $(name).value = kept[name] ?? "";
  $("thinking").checked = kept.thinking ?? true;
  $("key").value = read(session, KEY);
  $("settings-form").addEventListener("input", keep);
  $("settings-form").addEventListener("keydown", (event) => {
    // Enter in a field ends the dialog with what was typed, as its button does.
    if (event.key === "Enter" && event.target.matches("input")) {
      event.preventDefault();
      $("settings").close();
    }
  });
  $("settings").addEventListener("click", (event) => {
    if (event.target === $("settings")) $("settings").close(); // beside the panel
  });
  $("reset").addEventListener("click", () => {
    for (const name of [...NUMBERS, "system", "key"]) $(name).value = "";
    $("thinking").checked = true;
    keep();
  });
}

function keep() {
  const set = { thinking: $("thinking").checked };
  for (const name of [...NUMBERS, "system"]) if ($(name).value) set[name] = $(name).value;
  write(local, KEPT, JSON.stringify(set));
  write(session, KEY, apiKey());
}
