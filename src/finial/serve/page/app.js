// The conversation: what was asked and answered, and the page that shows it.
// Knows the document; how the server speaks is in stream.js, how text is shown in prose.js, what is set in settings.js.

import { Failure, answer, model } from "/stream.js";
import { Prose } from "/prose.js";
import { Pace, facts, share } from "/pace.js";
import { apiKey, bindSettings, knowThinking, options } from "/settings.js";

const $ = (id) => document.getElementById(id);
const scroll = $("scroll");
const message = $("message");

/** Turns in order: {asked, answered, element, failed}. */
const turns = [];
let served = null; // what /v1/models says
let running = null; // the AbortController of the answer that is being written

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, act) {
  const element = make("button", "", text);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}

// ------------------------------------------------------------------------------------------ model and facts

async function learn() {
  try {
    served = await model(apiKey());
  } catch (error) {
    $("welcome-name").textContent = "No model yet";
    if (!turns.length) showFacts([["", error instanceof Failure ? error.message : String(error)]]);
    return;
  }
  $("model").textContent = served.id;
  $("welcome-name").textContent = served.id;
  document.title = `${served.id} · finial`;
  showFacts(facts(served));
  knowThinking(served.finial?.thinking ?? true);
}

function showFacts(rows) {
  $("facts").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = make("div");
      row.append(make("dt", "", name), make("dd", "", value));
      return row;
    }),
  );
}

// ------------------------------------------------------------------------------------------------ scrolling

let following = true;

function toEnd() {
  following = true;
  scroll.scrollTop = scroll.scrollHeight;
}

function follow() {
  if (following) scroll.scrollTop = scroll.scrollHeight;
}

scroll.addEventListener("scroll", () => {
  following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 48;
  $("to-end").hidden = following;
});
$("to-end").addEventListener("click", () => {
  toEnd();
  message.focus();
});

// --------------------------------------------------------------------------------------------- one answer

/** What the server is to continue: every turn that has an answer, then the one that wants one. */
function history(last) {
  const said = [];
  const { system } = options();
  if (system) said.push({ role: "system", content: system });
  for (const turn of turns) {
    if (turn === last) break;
    if (turn.answered) said.push({ role: "user", content: turn.asked }, { role: "assistant", content: turn.answered });
  }
  return [...said, { role: "user", content: last.asked }];
}

function show(turn) {
  turn.element = make("li", "turn");
  turn.element.append(make("div", "asked", turn.asked));
  turn.body = turn.element.appendChild(make("div"));
  $("turns").append(turn.element);
}

/** The folded thoughts of an answer, and how long they took. */
function thinking(body) {
  const fold = make("details", "think");
  const summary = make("summary", "", "Thinking …");
  const text = make("div");
  fold.append(summary, text);
  body.append(fold);
  const prose = new Prose(text);
  const began = performance.now();
  let over = false;
  return {
    push: (piece) => prose.push(piece),
    end() {
      if (over) return;
      over = true;
      prose.end();
      summary.textContent = `Thought for ${((performance.now() - began) / 1000).toFixed(1)} s`;
    },
  };
}

async function speak(turn) {
  for (const old of document.querySelectorAll(".again")) old.remove();
  turn.body.replaceChildren();
  turn.element.className = "turn speaking";
  turn.answered = "";
  const control = new AbortController();
  busy(control);
  announce("Answering");
  const figures = make("div", "figures");
  const pace = new Pace(served, figures);
  turn.body.append(figures);
  let thoughts = null;
  let prose = null;
  let failed = null;
  try {
    const { system, ...asked } = options();
    const request = { model: served?.id ?? "", messages: history(turn), ...asked };
    for await (const event of answer(request, apiKey(), control.signal)) {
      pace.take(event);
      if (event.thought) {
        thoughts ??= thinking(turn.body);
        thoughts.push(event.thought);
      } else if (event.text) {
        thoughts?.end();
        turn.answered += event.text;
        prose ??= new Prose(turn.body.appendChild(make("div")));
        prose.push(event.text);
      }
      turn.body.append(figures); // stays last
      follow();
    }
  } catch (error) {
    failed = error;
  }
  thoughts?.end();
  prose?.end();
  const stopped = failed?.name === "AbortError";
  pace.end(stopped);
  turn.element.classList.remove("speaking");
  turn.element.classList.toggle("left-out", !turn.answered);
  offer(turn, figures, failed && !stopped);
  if (failed && !stopped) complain(turn, failed);
  busy(null);
  announce(failed ? (stopped ? "Stopped" : "") : turn.answered);
  follow();
}

const TITLES = { key: "Not allowed. ", busy: "Not now. ", refused: "Refused. ", lost: "Cut off. ", server: "Failed. " };

function complain(turn, error) {
  const known = error instanceof Failure;
  if (!known) console.error(error);
  const notice = make("div", "notice");
  notice.setAttribute("role", "alert");
  notice.append(make("strong", "", known ? TITLES[error.kind] : "Failed. "), known ? error.message : String(error));
  const acts = notice.appendChild(make("div", "acts"));
  if (known && error.kind === "key") acts.append(button("Enter the key", () => openSettings("key")));
  acts.append(againButton(turn, "Try again"));
  turn.body.append(notice);
}

function againButton(turn, text) {
  const again = button(text, () => {
    if (!running) speak(turn);
    message.focus();
  });
  again.className = "again";
  return again;
}

/** What can be done with an answer, at the end of its line of figures; only the last one can be asked for again. */
function offer(turn, figures, failed) {
  const acts = make("span", "acts");
  if (turn.answered && navigator.clipboard) { // absent where the page is not served securely
    const copy = button("Copy", async () => {
      await navigator.clipboard.writeText(turn.answered);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    acts.append(copy);
  }
  if (!failed) acts.append(againButton(turn, "Again"));
  if (acts.childElementCount) figures.append(acts);
}

// ------------------------------------------------------------------------------------------- the composer

function busy(control) {
  running = control;
  $("send").hidden = Boolean(control);
  $("stop").hidden = !control;
  scroll.setAttribute("aria-busy", String(Boolean(control)));
  ready();
}

function ready() {
  $("send").disabled = !message.value.trim();
  if (!CSS.supports("field-sizing", "content")) {
    message.style.height = "auto";
    message.style.height = `${message.scrollHeight}px`;
  }
}

function announce(text) {
  $("status").textContent = text;
}

function send() {
  const asked = message.value.trim();
  if (!asked || running) return;
  message.value = "";
  $("welcome").hidden = true;
  $("fresh").hidden = false;
  const turn = { asked, answered: "" };
  turns.push(turn);
  show(turn);
  toEnd();
  speak(turn);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("input", ready);
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => {
  running?.abort();
  message.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
});

$("fresh").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  $("fresh").hidden = true;
  message.focus();
});

function openSettings(field) {
  $("settings").showModal();
  if (field) $(field).focus();
}

$("open-settings").addEventListener("click", () => openSettings());
$("settings").addEventListener("close", () => {
  message.focus();
  learn(); // the key may be another one
});

bindSettings();
ready();
learn();
