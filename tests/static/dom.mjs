// As much of a document as the page's renderers use. There is no innerHTML: whoever parsed text as markup would fail.
class Node {
  childNodes = [];
  parent = null;
  append(...nodes) {
    for (const node of nodes) {
      if (node?.nodeName === "#fragment") this.append(...node.childNodes.splice(0));
      else this.#put(node instanceof Node ? node : new Text(String(node)));
    }
  }
  #put(node) {
    node.remove();
    node.parent = this;
    this.childNodes.push(node);
  }
  remove() {
    if (this.parent) this.parent.childNodes.splice(this.parent.childNodes.indexOf(this), 1);
    this.parent = null;
  }
  replaceWith(...nodes) {
    const { parent } = this;
    const at = parent.childNodes.indexOf(this);
    const after = parent.childNodes.splice(at);
    after.shift();
    this.parent = null;
    parent.append(...nodes);
    parent.childNodes.push(...after);
  }
  get firstChild() { return this.childNodes[0] ?? null; }
  get textContent() { return this.childNodes.map((child) => child.textContent).join(""); }
  set textContent(text) { this.childNodes = [new Text(text)]; }
}
class Text extends Node {
  nodeName = "#text";
  constructor(data) { super(); this.data = data; }
  get textContent() { return this.data; }
}
class Element extends Node {
  attributes = {};
  listeners = [];
  constructor(tag) { super(); this.nodeName = tag.toUpperCase(); }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(name) { this.listeners.push(name); }
}
globalThis.document = {
  createElement: (tag) => new Element(tag), createElementNS: (_, tag) => new Element(tag),
  createDocumentFragment: () => Object.assign(new Node(), { nodeName: "#fragment" }), getElementById: () => null,
};
globalThis.requestAnimationFrame = () => 0;

/** Every element below a node. */
export function* elements(node) {
  for (const child of node.childNodes) {
    if (child instanceof Element) yield child;
    yield* elements(child);
  }
}
