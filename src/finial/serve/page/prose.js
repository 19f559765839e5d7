// A model's words in the document: text nodes and nothing else, so that no answer can become markup.
// Knows paragraphs and fenced blocks of code; every other sign is shown as it was written.
//
//   const prose = new Prose(element); prose.push("Once "); prose.push("upon a time"); prose.end();

const FENCE = /^(`{3,})[^`]*$/;

export class Prose {
  #into;
  #line = ""; // the current line, as far as it has come
  #shown = 0; // how much of it is in the document
  #fence = null; // the marks that close the open block of code
  #text = null; // the text node that grows
  #gap = ""; // line ends that are shown once something follows them

  constructor(into) {
    this.#into = into;
    into.classList.add("prose", "open");
  }

  push(piece) {
    const lines = piece.split("\n");
    lines.forEach((part, at) => {
      this.#line += part;
      if (at < lines.length - 1) this.#close();
      else this.#grow();
    });
  }

  end() {
    if (this.#line && !this.#isFence(this.#line)) this.#show(this.#line.slice(this.#shown));
    this.#into.classList.remove("open");
  }

  #isFence(line) {
    if (this.#fence) return line.trimEnd() === this.#fence;
    return FENCE.test(line);
  }

  #grow() {
    if (this.#line.startsWith("`") && this.#shown === 0) {
      const marks = /^`+/.exec(this.#line)[0].length;
      if (marks === this.#line.length || (marks >= 3 && this.#isFence(this.#line))) return; // may become a fence
    }
    this.#show(this.#line.slice(this.#shown));
    this.#shown = this.#line.length;
  }

  #close() {
    if (this.#shown === 0 && this.#isFence(this.#line)) {
      this.#fence = this.#fence ? null : FENCE.exec(this.#line)[1];
      this.#text = null;
      this.#gap = "";
    } else {
      this.#show(this.#line.slice(this.#shown));
      if (this.#text) this.#gap += "\n";
    }
    this.#line = "";
    this.#shown = 0;
  }

  #show(text) {
    if (!text) return;
    if (!this.#text) {
      const block = this.#into.appendChild(document.createElement(this.#fence ? "pre" : "p"));
      if (this.#fence) block.tabIndex = 0; // long lines scroll, also by keyboard
      this.#text = block.appendChild(document.createTextNode(""));
      this.#gap = "";
    }
    this.#text.appendData(this.#gap + text);
    this.#gap = "";
  }
}
